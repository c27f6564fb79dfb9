"""How does a small vision-language model learn where the things are that a sentence names?

Qwen3-VL's own classes at a size that trains on a CPU, on pictures from any simulator that can say what is where.
Imports ``apt.model`` and below.
"""
