"""A student as a torch.export program (.pt2), which `torch.export.load` opens without this project or timm."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.storage.atomic import replace_file
from trainer.exports.answers import INPUT, Answers
from trainer.exports.checking import Answering

FILE_NAME = "model.pt2"
_OF_THIS_MACHINE = ("stack_trace", "source_fn_stack", "nn_module_stack", "from_node")  # paths and names of our code


def write_program(graph: Answers, folder: Path) -> dict[str, Any]:
    """Write the program for any size of batch, and return the versions that made it."""
    sizes = {INPUT: {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(graph, (graph.example,), dynamic_shapes=sizes)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            for name in _OF_THIS_MACHINE:
                node.meta.pop(name, None)
    saved = io.BytesIO()  # torch's own writer does not say why it failed
    torch.export.save(program, saved)
    replace_file(folder / FILE_NAME, saved.getvalue())
    return {"torch": torch.__version__}


def open_program(graph: Answers, folder: Path) -> Answering:
    """Return a function that answers with the program in a folder."""
    program = torch.export.load(folder / FILE_NAME).module()

    def answer(images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            return dict(zip(graph.names, program(images), strict=True))

    return answer
