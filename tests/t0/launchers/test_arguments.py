"""Which arguments a launcher adds to an engine's own, and when it adds none."""

import sys

import pytest

import launchers
from checkpoint.compatibility.engine import EngineFacts
from checkpoint.compatibility.launch_options import normalised_arguments
from launchers.errors import Usage
from launchers.options.tls import Tls
from tests.t0.checkpoint.compatibility.test_facts import venv

pytestmark = pytest.mark.t0
MODEL = ("--model-path", "/m")


def arguments(*more: str, spin: bool = False) -> tuple[str, ...]:
    return launchers.engine("sglang").parse([*MODEL, *more], {}, spin).arguments


def test_sglang_gets_sleep_on_idle():
    assert arguments() == (*MODEL, "--sleep-on-idle")
    assert arguments("--port", "1") == (*MODEL, "--sleep-on-idle")


@pytest.mark.parametrize("given", ["--sleep-on-idle", "--sleep_on_idle"])
def test_a_user_given_sleep_on_idle_has_the_same_identity(given):
    assert arguments(given) == (*MODEL, given)
    assert normalised_arguments("sglang", arguments(given)) == normalised_arguments("sglang", arguments())


def test_busy_polling_is_kept_and_has_another_snapshot():
    assert arguments(spin=True) == MODEL
    assert normalised_arguments("sglang", arguments(spin=True)) != normalised_arguments("sglang", arguments())


@pytest.mark.parametrize(
    "more",
    [
        ("--enable-dp-attention",),
        ("--enable_dp_attention",),
        ("--pp-size=2",),
        ("--pipeline-parallel-size", "2"),
        ("--disaggregation-mode", "decode"),
        ("--enable-hierarchical-cache",),
        ("--config", "/c.yaml"),
    ],
)
def test_schedulers_that_work_while_idle_get_no_sleep_on_idle(more):
    assert arguments(*more) == (*MODEL, *more)


def test_vllm_gets_no_added_arguments():
    assert launchers.engine("vllm").parse(["--model", "/m"], {}).arguments == ("--model", "/m")


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_keys_prefix_and_seed_are_read_from_a_configuration_file(name, tmp_path):
    engine = launchers.engine(name)
    file = tmp_path / "engine.yaml"
    seed, root = engine.seed_flags[0][2:], engine.root_path_flags[0][2:]
    file.write_text(f"api-key: 'k'\nadmin_api_key: a\n{root}: /api\n{seed}: 7\nport: 1\n")
    command = engine.parse([engine.model_flags[0], "m", "--config", str(file)], {})
    assert (command.api_key, command.admin_key, command.root_path, command.fixed_seed) == ("k", "a", "/api", True)
    assert command.port == 1
    command = engine.parse([engine.model_flags[0], "m", f"--config={file}", "--api-key", "line"], {})
    assert command.api_key == "line"
    command = engine.parse([engine.model_flags[0], "m", "--config", "/nowhere"], {})
    assert (command.api_key, command.admin_key, command.root_path, command.fixed_seed) == (None, None, "", False)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_the_engine_does_not_get_the_options_by_which_quickthaws_port_listens(name, tmp_path):
    engine = launchers.engine(name)
    flag = engine.model_flags[0]
    words = [flag, "m", "--ssl-keyfile=k", "--ssl-certfile", "c", "--ssl_ca_certs", "a", "--enable-ssl-refresh"]
    command = engine.parse(words, {}, True)
    assert command.arguments == (flag, "m")
    assert command.tls == Tls("c", "k", authorities="a", refresh=True)
    file = tmp_path / "engine.yaml"
    file.write_text("ssl-keyfile: k\nssl_certfile: c\nseed: 1\n")
    command = engine.parse([flag, "m", "--config", str(file), "--ssl-certfile", "line"], {}, True)
    assert command.tls == Tls("line", "k")
    assert command.arguments == (flag, "m", "--config", str(file), "--ssl-keyfile=")
    assert engine.parse([flag, "m", "--ssl-ca-certs", "a"], {}).tls is None


def test_more_options_by_which_an_engine_listens():
    vllm, sglang = (launchers.engine(name) for name in ("vllm", "sglang"))
    words = [
        "m",
        "--uds=/s",
        "--ssl-certfile",
        "c",
        "--ssl-cert-reqs",
        "2",
        "--ssl-ciphers",
        "x",
        "--no-enable-ssl-refresh",
    ]
    command = vllm.parse(words, {})
    assert command.arguments == ("--model", "m")
    assert (command.uds, command.tls) == ("/s", Tls("c", client_certificates=2, ciphers="x"))
    command = sglang.parse(["m", "--ssl-certfile", "c", "--ssl-keyfile", "k", "--ssl-keyfile-password", "p"], {}, True)
    assert command.tls == Tls("c", "k", "p") and "'p'" not in repr(command)
    assert "--uds" in sglang.parse(["m", "--uds", "/s"], {}).arguments  # not an option of SGLang, which says so


def test_a_demand_for_clients_certificates_is_never_taken_for_none():
    vllm = launchers.engine("vllm")
    for given, required in (("2", 2), ("02", 2), ("+1", 1), ("0", 0)):
        assert (
            vllm.parse(["m", "--ssl-certfile", "c", "--ssl-cert-reqs", given], {}).tls.client_certificates == required
        )
    for given in ("3", "-1", "CERT_REQUIRED"):
        with pytest.raises(Usage, match="ssl-cert-reqs"):
            vllm.parse(["m", "--ssl-certfile", "c", f"--ssl-cert-reqs={given}"], {})


def test_a_refresh_that_only_a_file_asks_for_runs_as_given(tmp_path):
    file = tmp_path / "engine.yaml"
    file.write_text("enable-ssl-refresh: true\n")
    assert launchers.engine("sglang").why_as_given(["m", "--config", str(file)], {})
    assert not launchers.engine("vllm").why_as_given(["m", "--config", str(file)], {})


@pytest.mark.parametrize(
    ("words", "variable", "key"),
    [
        ("--api-key a b", "", "a"),
        ("--api-key a --api-key b", "v", "b"),
        ("--api-key=a", "v", "a"),
        ("", "v", "v"),
        ("", "", None),
    ],
)
def test_the_key_that_vllm_takes(words, variable, key):
    assert launchers.engine("vllm").parse(["m", *words.split()], {"VLLM_API_KEY": variable}).api_key == key


@pytest.mark.parametrize(
    ("words", "arguments", "model"),
    [
        ("--port 8001 M", "--model M", "M"),
        ("--enforce-eager M --seed 1", "--model M --enforce-eager --seed 1", "M"),
        ("--tensor-parallel-size 2 M", "--model M --tensor-parallel-size 2", "M"),
        ("-tp 2 M", "--model M -tp 2", "M"),
        ("-O3 M", "--model M -O3", "M"),
        ("-O 3 M", "--model M -O 3", "M"),
        ("--served-model-name a b --no-enable-lora M", "--model M --served-model-name a b --no-enable-lora", "M"),
        ("--compilation-config.mode 3 M", "--model M --compilation-config.mode 3", "M"),
        ("--dtype=auto M", "--model M --dtype=auto", "M"),
        ("--api-key a b --enforce-eager M", "--model M --api-key a b --enforce-eager", "M"),
        ("--enforce-eager -- M", "--model M --enforce-eager", "M"),
        ("--unknown x --model M", "--unknown x --model M", "M"),
    ],
)
def test_a_positional_model_may_follow_options_of_vllm(words, arguments, model):
    command = launchers.engine("vllm").parse(words.split(), {})
    assert (" ".join(command.arguments), command.model) == (arguments, model)


def test_sglangs_positional_model_comes_first():
    parse = launchers.engine("sglang").parse
    assert parse(["M", "--tp", "2"], {}, True).arguments == ("--model-path", "M", "--tp-size", "2")
    with pytest.raises(Usage):
        parse(["--tp", "2", "M"], {})


@pytest.mark.parametrize(
    ("engine", "written", "full"),
    [
        ("vllm", "--tensor-par 2", "--tensor-parallel-size 2"),
        ("vllm", "--tensor_par=2", "--tensor-parallel-size=2"),
        ("vllm", "--no-enable-pref", "--no-enable-prefix-caching"),
        ("vllm", "--comp.mode 3", "--compilation-config.mode 3"),
        ("vllm", "--served a b", "--served-model-name a b"),
        ("vllm", "--tens --tensor-parallel-size", "--tensor-parallel-size --tensor-parallel-size"),
        ("vllm", "--enable-l", "--enable-l"),  # ambiguous
        ("vllm", "--config-f hf", "--config-format hf"),
        ("vllm", "--conf x", "--conf x"),
        ("vllm", "--nothing-such x", "--nothing-such x"),
        ("vllm", "--dtype --por", "--dtype --port"),
        ("sglang", "--tensor-parallel 2", "--tensor-parallel-size 2"),
        ("sglang", "--log-level-h info", "--log-level-http info"),
        ("sglang", "--sleep", "--sleep-on-idle"),
        ("sglang", "--model-path m -- --por", "--model-path m -- --por"),
    ],
)
def test_abbreviated_options_expand_as_in_argparse(engine, written, full):
    assert launchers.engine(engine).options.expanded(written.split()) == full.split()


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_abbreviations_are_accepted_wherever_the_full_name_is(name):
    engine = launchers.engine(name)
    flag = engine.model_flags[0]
    command = engine.parse([flag, "m", "--por", "8001", "--hos=::1", "--api-k", "k"], {}, True)
    assert (command.port, command.host, command.api_key) == (8001, "::1", "k")
    assert command.arguments == (flag, "m", "--api-key", "k")
    seed, root = engine.seed_flags[0][:-1], engine.root_path_flags[0][:-1]
    command = engine.parse([flag, "m", seed, "1", root, "/x"], {})
    assert (command.fixed_seed, command.root_path) == (True, "/x")
    full, short = (engine.parse([flag, "m", word, "2"], {}).arguments for word in ("--download-dir", "--download"))
    assert normalised_arguments(name, short) == normalised_arguments(name, full)


def test_the_installed_engine_decides_about_an_abbreviation(tmp_path):
    """Another release may have an option of that name, or lack one that the tested release has."""
    venv(tmp_path / "venv", {"vllm": "0.99"})
    python = str(tmp_path / "venv/bin/python")
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    expanded = launchers.engine("vllm").options.expanded
    assert expanded(["--download", "x"], python) == [
        "--download-dir",
        "x",
    ]  # the engine's own options cannot be read there
    (site / "vllm/engine").mkdir(parents=True)
    source = site / "vllm/engine/arg_utils.py"
    source.write_text('    load_group.add_argument("--download-dir", **load_kwargs["download_dir"])\n')
    assert expanded(["--download", "x"], python) == ["--download-dir", "x"]
    assert expanded(["--tensor-par", "x"], python) == ["--tensor-par", "x"]
    source.write_text(source.read_text() + '    load_group.add_argument("--download")\n')
    assert expanded(["--download", "x"], python) == ["--download", "x"]
    (site / "vllm/entrypoints/openai").mkdir(parents=True)
    (site / "vllm/entrypoints/openai/cli_args.py").write_text("    port: int = 8000\n")
    assert expanded(["--por", "1"], python) == ["--port", "1"]


def test_the_engines_shutdown_timeout_is_read():
    parse = launchers.engine("vllm").parse
    assert parse(["--model", "m", "--shutdown-timeout", "90"], {}).shutdown_timeout_s == 90
    assert parse(["--model", "m", "--shutdown=90"], {}).shutdown_timeout_s == 90
    assert parse(["--model", "m", "--shutdown-timeout", "soon"], {}).shutdown_timeout_s == 0
    assert "--shutdown-timeout" in parse(["--model", "m", "--shutdown-timeout", "90"], {}).arguments


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_a_sandbox_has_its_own_folders_and_keeps_the_users_caches(name):
    engine = launchers.engine(name)
    command = engine.parse(["m"], {})
    given = {"TMPDIR": "/t", "PROMETHEUS_MULTIPROC_DIR": "/p", "VLLM_CACHE_ROOT": "/v", "TRITON_CACHE_DIR": "/c"}
    inside = engine.environment(given, command, sandboxed=True, site="", cache="/own")
    assert inside["TMPDIR"] == inside["PROMETHEUS_MULTIPROC_DIR"] != "/t"
    assert (inside["VLLM_CACHE_ROOT"], inside["TRITON_CACHE_DIR"]) == ("/v", "/c")
    outside = engine.environment(given, command, sandboxed=False, site="", cache="/own")
    assert given.items() <= outside.items()
    without = engine.environment({}, command, sandboxed=True, site="", cache="/own")
    assert "PROMETHEUS_MULTIPROC_DIR" not in without


@pytest.mark.parametrize("words", [("--model", "/m"), ("--model=/m",), ("--model-path=/m",)])
def test_each_name_of_the_model_option_means_the_same_snapshot(words):
    assert launchers.engine("sglang").parse(words, {}).arguments == arguments()


def test_vllm_without_a_model_serves_the_default_of_the_installed_release(tmp_path):
    source = tmp_path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages" / "vllm"
    (source / "config").mkdir(parents=True)
    (source / "config" / "model.py").write_text('class ModelConfig:\n    model: str = "acme/default"\n')
    (tmp_path / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {sys.version.split()[0]}\n")
    vllm = launchers.engine("vllm")
    command = vllm.parse(["serve", "--dtype", "float32"], {}, python=str(tmp_path / "bin" / "python"))
    assert command.model == "acme/default"
    assert command.arguments == ("--model", "acme/default", "--dtype", "float32")
    with pytest.raises(Usage, match="no model given"):
        vllm.parse(["serve"], {})


@pytest.mark.parametrize(
    ("engine", "version", "settings", "given"),
    [
        ("vllm", "vllm 0.32.0", "expandable_segments:True", ("--enable-sleep-mode",)),
        ("vllm", "vllm 0.26.1", "expandable_segments:True", ()),
        ("vllm", "vllm 0.26.1", "max_split_size_mb:512", ("--enable-sleep-mode",)),
        ("sglang", "sglang 0.5.23", "max_split_size_mb:512, expandable_segments: true", ()),
        ("sglang", "sglang 0.5.23", "expandable_segments:False", ("--enable-memory-saver",)),
    ],
)
def test_expandable_segments_never_meet_an_option_that_refuses_them(engine, version, settings, given):
    launcher = launchers.engine(engine)
    installed = EngineFacts(engine, version, "", "", "", "", "", {"torch_memory_saver": "0.0.10"})
    command = launcher.parse(["--model", "/m"], {})
    assert launcher.gpu_arguments(command, installed, {"PYTORCH_CUDA_ALLOC_CONF": settings}) == given
    assert launcher.gpu_arguments(command, installed, {"PYTORCH_ALLOC_CONF": settings}) == given


@pytest.mark.parametrize(
    ("words", "packages", "given", "said"),
    [
        ([], {"torch_memory_saver": "0.0.10"}, ("--enable-memory-saver",), ""),
        ([], {"torch-memory-saver": "0.0.10"}, ("--enable-memory-saver",), ""),
        (["--enable-memory-saver"], {"torch_memory_saver": "0.0.10"}, (), ""),
        ([], {}, (), "memory-saver-missing: the driver carries"),
        (["--enable-memory-saver"], {}, (), "memory-saver-missing: SGLang ends at --enable-memory-saver"),
    ],
)
def test_sglang_without_its_memory_saver_is_named_with_the_remedy(words, packages, given, said, caplog):
    launcher = launchers.engine("sglang")
    installed = EngineFacts("sglang", "sglang 0.5.23", "", "", "", "", "", packages)
    command = launcher.parse(["--model-path", "/m", *words], {})
    with caplog.at_level("WARNING", "quickthaw"):
        assert launcher.gpu_arguments(command, installed, {}) == given
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    assert not said or (lines[0].startswith(said) and "pip install torch-memory-saver" in lines[0])
