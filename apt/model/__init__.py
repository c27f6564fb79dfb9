"""What is the policy? Its maths, its VLM and the names of its tensors; no flags, no run.

``vla`` over ``vlm`` over ``config`` over ``experts`` and ``encoders`` over ``objectives`` over ``layers``, which import
``data_utils.types`` and below.
"""
