"""ONNX files in ONNX Runtime, on the CPU."""
import onnxruntime
import torch


def load_onnx(path):
    """A function of the file's inputs, in their order, that gives a list of its outputs; all are tensors."""
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    names = [each.name for each in session.get_inputs()]
    return lambda *inputs: [
        torch.from_numpy(output) for output in session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})]
