"""The network in each of its forms, as calls that return `sr` and `pt_lengths`.

These are the reference in eager mode (in a half type under autocast, and with weights cast once),
`torch.compile` of it, the accelerated network, and its ONNX file in ONNX Runtime and OpenVINO.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lemma_fast.acceleration import accelerate
from lemma_fast.bench.plan import PRECISIONS
from lemma_fast.model import LEMMA

#: Takes crops, returns `sr` and `pt_lengths`.
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


class Unavailable(RuntimeError):
    """A variant that this machine or installation does not have; the message says why."""


class Variants:
    """Builds variants of one network, and keeps the ONNX file that two of them read."""

    def __init__(self, model: LEMMA, device: torch.device, compile_mode: str | None = None) -> None:
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.device = device
        self.compile_mode = compile_mode
        self._folder = tempfile.TemporaryDirectory()
        self._built: dict[tuple[str, str], Forward] = {}
        #: What the accelerated network says that it uses, by variant and precision.
        self.uses: dict[tuple[str, str], dict[str, str]] = {}

    def forward(self, variant: str, kind: str, batch: int) -> Forward:
        """Return a variant's call in a precision, ready for batches of a size.

        Raises Unavailable.
        """
        if variant in ("onnxruntime", "openvino"):
            if self.device.type != "cpu" or kind != "float32":
                raise Unavailable(f"{variant} is compared in fp32 on the CPU alone")
            return getattr(self, f"_{variant}")(batch)
        if (variant, kind) not in self._built:
            build = getattr(self, f"_{variant.replace('-', '_')}")
            self._built[variant, kind] = build(kind)
        return self._built[variant, kind]

    def _reference(self, kind: str) -> Forward:
        return self._autocast(copy.deepcopy(self.model), kind)

    def _reference_cast(self, kind: str) -> Forward:
        dtype = PRECISIONS[kind]
        if dtype == torch.float32:
            raise Unavailable("weights are cast in a half type alone")
        network = copy.deepcopy(self.model).to(dtype)

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                sr, prior = network(lr.to(dtype))
            return sr, prior.pt_lengths

        return forward

    def _compiled(self, kind: str) -> Forward:
        # Without gradients the weights may be taken for constants, as all the others do.
        options: dict[str, Any] | None = {"freezing": True} if self.device.type == "cpu" else None
        mode = None if options else self.compile_mode
        network = torch.compile(
            copy.deepcopy(self.model), dynamic=False, mode=mode, options=options
        )
        return self._autocast(network, kind)

    def _autocast(self, network: Callable[[Tensor], Any], kind: str) -> Forward:
        dtype = PRECISIONS[kind]
        half = dtype != torch.float32

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=half):
                sr, prior = network(lr)
            return sr, prior.pt_lengths

        return forward

    def _accelerated(self, kind: str) -> Forward:
        dtype = PRECISIONS[kind]
        tf32 = kind == "tf32" if dtype == torch.float32 else None
        network = accelerate(self.model, dtype, tf32=tf32)
        self.uses["accelerated", kind] = network.describe()

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            sr, prior = network(lr)
            return sr, prior.pt_lengths

        return forward

    def _onnx_file(self) -> Path:
        path = Path(self._folder.name) / "model.onnx"
        if not path.exists():
            from lemma_fast.onnx import ExportError, export_onnx

            try:
                # Runtimes fold what they load, and the longer way to it changes no time.
                export_onnx(self.model, path, check=False, optimize=False)
            except ExportError as error:
                raise Unavailable(str(error)) from error
        return path

    def _onnxruntime(self, batch: int) -> Forward:
        _need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # It remarks on every constant that it leaves as it is.
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("N", batch)
        session = onnxruntime.InferenceSession(
            str(self._onnx_file()), options, providers=["CPUExecutionProvider"]
        )

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            sr, lengths = session.run(["sr", "pt_lengths"], {"lr": lr.numpy()})
            return torch.from_numpy(sr), torch.from_numpy(lengths)

        return forward

    def _openvino(self, batch: int) -> Forward:
        _need("openvino")
        import openvino

        core = openvino.Core()
        graph = core.read_model(self._onnx_file())
        graph.reshape({"lr": [batch, self.model.config.in_channels, *self.model.config.size]})
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = core.compile_model(graph, "CPU", settings).create_infer_request()

        def forward(lr: Tensor) -> tuple[Tensor, Tensor]:
            results = request.infer({"lr": lr.numpy()})
            return torch.from_numpy(results["sr"]), torch.from_numpy(results["pt_lengths"])

        return forward


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
