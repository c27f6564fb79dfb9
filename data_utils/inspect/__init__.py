"""What does a person see of episodes: faults in words, pictures, films, a scene in 3-D?

The top floor of ``data_utils``; imports all of it.
"""
