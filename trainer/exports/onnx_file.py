"""A student as an ONNX file, in float32, float16 or int8, and its answers by ONNX Runtime.

float16 and int8 are made from the float32 file by ONNX Runtime's own tools. Inputs and outputs keep their types.
"""

import importlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UsageError
from pipeline.images.source import open_source
from pipeline.storage.atomic import refusals_named
from trainer.evidence.analyse import Crops
from trainer.exports.answers import BATCH, INPUT, Answers
from trainer.exports.checking import Answering, crop_batches
from trainer.exports.config import StudentExportConfig

FILE_NAME, WEIGHTS_NAME = "model.onnx", "model.onnx.data"
_WHOLE = "whole.onnx"  # the float32 file, from which the tools make the quantised one
MOST_BYTES = 1_900_000_000  # of weights in one file; a protocol buffer holds 2 GiB at most
LEAST_QUANTISED = 0.5  # share of the weights in an int8 file that must be int8
_LINEAR_LAYERS = ["MatMul", "Gemm"]  # dynamic quantisation of convolutions is slower than float32
# The tool would quantise additions and normalisations too: then a tiny DeiT kept 7 % of its answers instead of 87 %.
_LAYERS = [*_LINEAR_LAYERS, "Conv"]


def check_extra() -> None:
    """Raise UsageError if a package of the extra `onnx` is missing."""
    # ONNX Runtime's tools import modules from a folder that they put on sys.path only once: all are imported here, together.
    for name in ("onnx", "onnxscript", "onnxruntime", "onnxruntime.quantization"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"--to onnx needs the package {name} ({error})", fix="pip install 'deit-cli[onnx]'"
            ) from error


def write_onnx(graph: Answers, folder: Path, config: StudentExportConfig) -> dict[str, Any]:
    """Write the file for any size of batch, and return the versions that made it.

    Raises:
        UsageError: int8 leaves most of the weights in float32.
    """
    import onnx
    import onnxruntime

    path = folder / FILE_NAME
    with refusals_named(path):
        _write_float32(graph, path)
        facts: dict[str, Any] = {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        }
        facts["opset"] = next(
            each.version for each in onnx.load(path, load_external_data=False).opset_import if not each.domain
        )
        if config.precision == "float16":
            _to_float16(path)
        if config.precision == "int8":
            _to_int8(graph, path, config)
    return facts


def open_onnx(graph: Answers, folder: Path) -> Answering:
    """Return a function that answers with the file in a folder, by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILE_NAME, providers=["CPUExecutionProvider"])

    def answer(images: Tensor) -> dict[str, Tensor]:
        outputs: Any = session.run(list(graph.names), {INPUT: images.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(graph.names, outputs, strict=True)}

    return answer


def _write_float32(graph: Answers, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            graph,
            (graph.example,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(graph.names),
            dynamic_shapes={INPUT: {0: BATCH}},
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # paths of this machine and names of our code
    for value in program.model.graph.initializers.values():
        value.metadata_props.clear()
    program.save(str(path), external_data=_bytes(graph) > MOST_BYTES)


def _bytes(graph: Answers) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())


def _refuse_large(path: Path, precision: str) -> None:
    if (path.parent / WEIGHTS_NAME).exists():
        raise UsageError(
            f"--precision {precision} needs weights of at most {MOST_BYTES:,} bytes", fix="Pass --precision float32"
        )


def _to_float16(path: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    _refuse_large(path, "float16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights below the smallest float16 become zero
        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


# --- int8 -------------------------------------------------------------------------------------------------------------


def _to_int8(graph: Answers, path: Path, config: StudentExportConfig) -> None:
    """Replace a float32 file by an int8 one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    _refuse_large(path, "int8")
    whole = path.with_name(_WHOLE)
    path.rename(whole)
    common: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # the tools write advice to the root logger
    try:
        if config.calibration_data is None:
            quantize_dynamic(whole, path, op_types_to_quantize=_LINEAR_LAYERS, **common)
        else:
            reader = _calibration(graph, config)
            quantize_static(
                whole, path, reader, op_types_to_quantize=_LAYERS, activation_type=QuantType.QUInt8, **common
            )
    finally:
        logging.root.setLevel(level)
    _check_quantised(path, calibrated=config.calibration_data is not None)
    whole.unlink()


def _calibration(graph: Answers, config: StudentExportConfig) -> Any:
    """Return the reader of the calibration images, as the tool wants it."""
    from onnxruntime.quantization import CalibrationDataReader

    source = open_source(str(config.calibration_data), options=replace(config.options, labels_file=None))
    crops = Crops.spread(source, config.calibration_samples, config.crop_pct)

    class Reader(CalibrationDataReader):
        """One batch after the other."""

        def __init__(self) -> None:
            self._batches: Iterator[tuple[Tensor, Tensor]] = crop_batches(crops, graph.student, config.workers)

        def get_next(self) -> Any:
            """Return the next batch by the name of the input, or None."""
            found = next(self._batches, None)
            return None if found is None else {INPUT: graph.input_of(found[0]).numpy()}

    return Reader()


def _check_quantised(path: Path, *, calibrated: bool) -> None:
    """Raise UsageError if most of the weights are not int8."""
    import onnx

    model = onnx.load(path)
    small = _numbers(each for each in model.graph.initializer if each.data_type in _EIGHT_BITS)
    share = small / max(1, _numbers(model.graph.initializer))
    if share < LEAST_QUANTISED:
        raise UsageError(
            f"--precision int8 would quantise only {100 * share:.0f} % of the weights, those of linear layers"
            if not calibrated
            else f"--precision int8 would quantise only {100 * share:.0f} % of the weights",
            fix="Pass --precision float16"
            if calibrated
            else "Pass --calibration-data IMAGES too, which quantises all layers",
        )


_EIGHT_BITS = (2, 3)  # onnx.TensorProto.UINT8 and INT8


def _numbers(initializers: Iterable[Any]) -> int:
    return sum(math.prod(each.dims) for each in initializers)
