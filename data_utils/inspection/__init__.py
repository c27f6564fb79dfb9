"""The parts of ``python -m data_utils.inspect``: what episodes hold, what is unusual in them, and pictures of them."""
