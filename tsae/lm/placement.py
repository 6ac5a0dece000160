"""A language model that no single device holds: which of its modules lie on which GPU, in memory, or on the disk.

An example, a model of 80 blocks of 1.7 GB read after block 40, on two GPUs that may fill 30 GB each and a CPU with 16 GB free:
blocks 0 to 16 go to the first GPU (with the embedding), 17 to 33 to the second, 34 to 40 to the CPU's memory, from where each
is copied to a GPU while it runs. Blocks 41 to 79 stay in their files, for a harvest ends before them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tsae.config.sections import UNITS, ModelConfig
from tsae.lm.hook import find_blocks, find_hook
from tsae.lm.pretrained import from_pretrained
from tsae.runtime.errors import TsaeError

Devices = dict[str, int | str]
"""Path of a module → GPU number, `cpu` or `disk`."""


def place(model: ModelConfig, dtype: Any, commit: str | None, read_at: Sequence[ModelConfig]) -> Devices:
    """Where the modules of a model go, as accelerate fills the devices; nothing is loaded.

    Blocks after the last that `read_at` names, if it names any, stay on the disk. Raises TsaeError.
    """
    from accelerate import infer_auto_device_map, init_empty_weights
    from accelerate.utils import get_max_memory
    from transformers import AutoConfig, AutoModelForCausalLM

    config = from_pretrained(AutoConfig, model, "a config.json", commit)
    try:
        with init_empty_weights():
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        module.tie_weights()
    except Exception as error:  # whatever the model's own code makes of a configuration that contradicts itself
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise TsaeError(f"model.name: {model.name} cannot be spread over devices: {reason[:300]}") from error
    above, blocks = list[str](), ""
    depth = config.get_text_config().num_hidden_layers
    if read_at:
        blocks = find_blocks(module, depth)
        inside = [re.match(rf"{re.escape(blocks)}\.(\d+)", find_hook(module, place, depth)) for place in read_at]
        last = max((int(found[1]) for found in inside if found), default=depth - 1) if all(inside) else depth - 1
        above = [f"{blocks}.{number}" for number in range(last + 1, depth)]
        del module.get_submodule(blocks)[last + 1 :]
    room: dict[int | str, Any] = get_max_memory()
    if model.device == "cpu":
        room = {"cpu": room["cpu"]}
    if model.max_memory is not None:
        asked = _bytes(model.max_memory)
        if unknown := [name for name in asked if name not in room]:
            raise TsaeError(
                f"model.max_memory: there is no device {unknown[0]} here; there are {', '.join(map(str, room))}"
            )
        room = {name: asked.get(name, 0) for name in room}
    never_split = getattr(module, "_no_split_modules", None) or []
    found = infer_auto_device_map(module, room, no_split_module_classes=list(never_split), dtype=dtype)
    if all(where == "disk" for where in found.values()):
        raise TsaeError(
            f"model.max_memory: no device has room for a block of {model.name} beside the largest one; allow more"
        )
    while (
        above
        and (outer := next((path for path in found if path == "" or f"{blocks}.".startswith(f"{path}.")), None))
        is not None
    ):
        # A module that holds the blocks cannot be in one place; what is in it can.
        inner = [f"{outer}.{name}".removeprefix(".") for name, _ in module.get_submodule(outer).named_children()]
        found |= dict.fromkeys(inner, found.pop(outer))
    return {**found, **dict.fromkeys(above, "disk")}


def _bytes(text: str) -> dict[int | str, int]:
    """`0=20GB,cpu=60GB` → {0: 20e9, "cpu": 60e9}."""
    found: dict[int | str, int] = {}
    for name, number, unit in re.findall(r"(\w+)=([\d.]+) ?(\w+)", text):
        found[int(name) if name.isdigit() else name] = int(float(number) * 1000 ** UNITS.index(unit))
    return found
