"""How is a vision-language model loaded and fed?

Imports ``apt.model.layers`` and below; knows no expert.
"""
