"""How is it all used? Simulators to record in, train on and evaluate in, and a client's loop.

The top floor: imports everything, and nothing imports it.
"""
