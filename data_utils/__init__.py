"""Episodes on disk: files are checked, indexed, sampled, batched; and converted, exported, looked at.

From the top: ``inspect``, ``batches`` and ``datasets``, ``samples``; below these no torch: ``export``, ``convert`` and
``index``, ``checks``, ``h5io``, ``episodes``, ``video`` and ``drawing``, ``geometry``, ``data_loc``, and the ground
that is shared by all: ``config``, ``cli``, ``files``, ``errors``, ``words``, ``worker_process``, and ``types``, which
alone of these holds tensors. Imports nothing of the house but itself.
"""
