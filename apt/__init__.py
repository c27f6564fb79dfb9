"""The policy: what it is, how it learns, how a robot uses it, which recipe is better.

From the top: ``cli``, the commands ``train`` and ``ablate``, ``ablation``, ``training`` beside ``infer`` and
``grounding``, ``presets``, ``checkpoint``, ``model_card``, ``configs``, ``hub`` (whose folders ``hub_folder`` writes),
``model``. A module imports floors below its own, ``train_utils``, ``infer_utils`` and below; never ``examples``.
"""

__version__ = "0.1.0"
