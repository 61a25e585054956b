"""A launch's properties as a start reads them: several GPUs, from the command line or a file that it names."""

from types import SimpleNamespace

import pytest

from plugin.runtime.steps import compatibility

pytestmark = pytest.mark.t0


def launch(*words, gpus=("gpu",), arguments=None, **environment):
    settings = SimpleNamespace(command=SimpleNamespace(arguments=words), environment=environment)
    engine = SimpleNamespace(packages={"nvidia_nccl_cu13": "2.27.5", "torch": "2.13.0"})
    host = SimpleNamespace(gpus=gpus, driver="580.159.03")
    here = SimpleNamespace(host=host, engine=engine, arguments=arguments or {})
    return compatibility.multi_gpu(settings, here, lambda: None)


def test_several_gpus_are_read_from_the_command_line_or_its_config_file(tmp_path, caplog):
    file = tmp_path / "engine.yaml"
    file.write_text("tensor-parallel-size: 2\n")
    digest = {"--config": (("blake3:0",),)}
    assert launch("--config", str(file), arguments=digest), "the identity has only the file's digest"
    assert "multi-gpu" in caplog.text and "uses several GPUs" in caplog.text
    assert "(probed: driver 580.159.03, CUDA IPC needs 610; CustomStorage not probed; NCCL 2.27.5, " in caplog.text
    assert launch(arguments={"--tensor-parallel-size": (("2",),)})
    file.write_text("tensor-parallel-size: 1\n")
    assert not launch("--config", str(file), arguments=digest)
    assert not launch("--config", str(file), arguments={"--tensor-parallel-size": (("2",),)}, gpus=())
    assert launch(CUDA_VISIBLE_DEVICES="MIG-0")
