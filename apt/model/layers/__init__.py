"""What are experts and encoders built of?

Imports torch alone, and xformers where it is asked for.
"""
