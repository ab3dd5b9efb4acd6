"""A whole model on the emulated GPU, through the engine; `make simt` has more."""

from tests.emulator.matrix.models import result_of_process


def test_a_model_on_the_emulated_gpu_follows_onnxruntime(shared_folder):
    said, right = result_of_process("float16, two slots", shared_folder / "emulator")
    assert right, said
