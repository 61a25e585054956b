"""Weights as torch holds them, through the code for a device: recorded, lost, and taken from the ring.

`python torch_weights.py FOLDER DEVICE` (with torch and safetensors; the device may be the CPU) prints what came back, as JSON.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from plugin.engine import weights
from plugin.runtime.phases import PhaseTracker
from plugin.runtime.weight_ring import feed, layout


def main(folder, device):
    folder.mkdir(exist_ok=True)
    control, snapshot = folder / "control", folder / "snapshot"
    control.mkdir()
    os.environ["QUICKTHAW_CONTROL_DIR"] = str(control)
    if device == "cpu":
        weights._HostStorage = weights._DeviceStorage
    feed.SLOT_BYTES = 70_000
    torch.manual_seed(1)
    q, k, v = (torch.randn(rows, 64, dtype=torch.bfloat16) for rows in (640, 128, 128))
    down, embedding = torch.randn(64, 999, dtype=torch.bfloat16), torch.randn(500, 64, dtype=torch.bfloat16)
    eighth = torch.randn(96, 80).to(torch.float8_e4m3fn)
    save_file({"q": q, "k": k, "v": v, "down": down, "embed": embedding, "eighth": eighth}, folder / "m.safetensors")
    model = torch.nn.Module()
    padded = torch.zeros(512, 64, dtype=torch.bfloat16)
    padded[:500] = embedding
    with torch.inference_mode():
        held = {
            "qkv": torch.cat([q, k, v]),
            "down": down.clone(),
            "embed": padded.clone(),
            "transposed": eighth.clone().t(),
            "computed": torch.rand(77),
        }
        for name, tensor in held.items():
            model.register_parameter(name, torch.nn.Parameter(tensor.to(device), requires_grad=False))
        model.head = model.embed
    expected = {name: tensor.clone() for name, tensor in held.items()}
    weights.record([model], [str(folder)])
    for name, file in layout.collect(control).items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, snapshot / name)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data.view(torch.uint8).fill_(3) if parameter.is_contiguous() else parameter.data.t().view(
                torch.uint8
            ).fill_(3)
    with feed.WeightFeed(PhaseTracker()) as ring:
        ring.begin(snapshot, "", None)
        ring.offer(control)
        filled = weights.refill([model])
        answer = json.loads(next(control.glob("*.refilled")).read_text())
    same = {
        name: torch.equal(parameter.data.cpu().float(), expected[name].float())
        for name, parameter in model.named_parameters()
        if name in expected
    }
    own = json.loads((snapshot / "weights" / "layout.json").read_text())["own"]
    print(json.dumps({"filled": filled, "answer": answer, "same": same, "own": own}))


main(Path(sys.argv[1]), sys.argv[2])
