"""Loading vision-language models and feeding them."""
