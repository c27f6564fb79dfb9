"""What is the network trained to predict, and how do its predictions turn noise into actions?

Imports torch and diffusers alone.
"""
