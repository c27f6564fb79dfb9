"""What are experts and encoders built of?

Imports torch alone.
"""
