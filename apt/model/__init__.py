"""What is the policy? Its maths, its VLM and the names of its tensors; no flags, no run.

``vla`` over ``vlm`` and ``pretrained`` over ``config`` over ``experts`` and ``encoders`` over ``objectives``,
``action_transform``, ``language_loss`` and ``state_dict_adapter`` over ``action_scale`` over ``layers``; below all of
them lies ``data_utils.types``.
"""
