"""The interface every action expert meets, and the experts other than APT's own."""
