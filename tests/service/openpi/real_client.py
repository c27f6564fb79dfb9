"""What openpi's own client makes of the service; runs in its environment (numpy < 2), without this library.

``python real_client.py HOST PORT FRAME.npz`` prints one JSON object with what the real client made of the service.
"""

import json
import sys
import time

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def nested(flat: dict) -> dict:
    """{"cam/data/color": x} to {"cam": {"data": {"color": x}}}"""
    found: dict = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        inner = found
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value if value.ndim or value.dtype.kind == "U" else value.item()
        inner[name] = str(value) if value.dtype.kind == "U" else inner[name]
    return found


def main(host: str, port: str, file: str) -> None:
    observation = nested(dict(np.load(file)))
    client = WebsocketClientPolicy(host, int(port))
    told: dict = {"metadata": sorted(client.get_server_metadata()), "numpy": np.__version__}

    reply = client.infer(observation)
    told["chunk"] = reply["actions"].tolist()

    timeless = {key: value for key, value in observation.items() if key != "timestamp"}
    broker = ActionChunkBroker(WebsocketClientPolicy(host, int(port)), action_horizon=4)
    steps = [broker.infer(timeless) for _ in range(9)]
    told["broker"] = [list(step["actions"].shape) for step in steps]
    told["asked"] = len({step["server_timing"]["infer_ms"] for step in steps})

    try:
        client.infer({**observation, "gripper": 9.0, "reset": True})
    except RuntimeError as error:
        told["error"] = str(error)
    told["after_error"] = client.infer({**observation, "reset": True})["actions"].shape[1]

    again = WebsocketClientPolicy(host, int(port))  # a second one, while the first is there
    began = time.monotonic()
    again.infer(observation)
    told["second_s"] = time.monotonic() - began
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
