"""What becomes of a predicted trajectory? It is blended with earlier ones, and drawn.

Knows no policy: imports ``data_utils`` below its torch line, and no torch.
"""
