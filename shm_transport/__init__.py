"""Call a service in another process, with arrays through shared memory: the client's side.

    from shm_transport import get_shm_proxy

    with get_shm_proxy("apt_control", ns_host="localhost", ns_port=9091) as robot:
        robot.add_obs_frame(frame)
        poses, grippers, times, image = robot.get_action()

Needs numpy and Pyro4 on Python 3.8 or later. ``shm_transport.server`` has the other side, ``python -m
shm_transport.check`` finds out what is wrong with a set-up.
"""

from .client import ShmProxy, connection_info, get_shm_proxy, ping
from .errors import CallTimeout, MalformedMessage, RemoteError, SessionLost, TransportError
from .marks import dive_into, expose
from .names import NoNameServer, UnknownName

__all__ = [
    "CallTimeout",
    "MalformedMessage",
    "NoNameServer",
    "RemoteError",
    "SessionLost",
    "ShmProxy",
    "TransportError",
    "UnknownName",
    "connection_info",
    "dive_into",
    "expose",
    "get_shm_proxy",
    "ping",
]
