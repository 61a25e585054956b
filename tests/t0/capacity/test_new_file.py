"""`quickthaw plan init`: a file that plans, from flags or answers; what is missing is named in one run."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from capacity.cli import plan
from capacity.errors import InputError
from capacity.inputs import new_file, prices
from capacity.inputs.load import load

pytestmark = pytest.mark.t0


def typed(*words, code=0, **options):
    result = CliRunner().invoke(plan, [str(word) for word in words], **options)
    assert result.exit_code == code, result.output + result.stderr
    return result


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKTHAW_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def trace(path, seconds=7200):
    rows = "".join(f"2026-01-05T{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d},10,10\n" for s in range(seconds))
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    return path


MODEL = "/models/llama-8b,gpus=1,rate=3.5/s,cold=97s 105s,restored=1.9s"


def test_one_model_two_types_and_a_trace(tmp_path):
    file = tmp_path / "sub" / "plan.yaml"
    file.parent.mkdir()
    words = (
        "--model",
        MODEL,
        "--gpu",
        "H100,boot=170s 190s",
        "--gpu",
        "g6e.xlarge,boot=60s,quota=30",
        "--region",
        "east",
    )
    said = typed("init", file, *words, "--trace", trace(tmp_path / "week.csv"), "--steps", 3).stdout
    assert "bins of" in said
    text = file.read_text()
    # The table is of one cloud on one day: the answer and the file say so, and how to give others.
    for place in (said, text):
        assert prices.SOURCE in place and "2026-01-21" in place and "--prices" in place
    assert "path: ../week.csv" in text
    problem = load(file)
    assert [(p.name, p.gpu, p.gpus, p.price, p.boot) for p in problem.pools] == [
        ("p5.48xlarge-east", "H100", 8, 55.04, (170.0, 190.0)),
        ("g6e.xlarge-east", "L40S", 1, 1.861, (60.0,)),
    ]
    assert (problem.services[0].cold, problem.services[0].target_wait) == ((97.0, 105.0), 5.0)
    assert problem.demand.steps == 3
    answer = typed(file).stdout.splitlines()[0]
    assert answer.startswith("Hold 1 × g6e.xlarge (0 GPUs idle) now: $1.86/h on average."), answer
    assert "is there already" in typed("init", file, *words, code=2).stderr
    typed("init", file, *words, "--trace", tmp_path / "week.csv", "--force")


@pytest.mark.parametrize(
    ("named", "gpus", "wanted"),
    [
        ("L40S,boot=60s", 1, [("g6e.48xlarge", "L40S", 8), ("g6e.12xlarge", "L40S", 4), ("g6e.xlarge", "L40S", 1)]),
        ("L40S,boot=60s", 4, [("g6e.48xlarge", "L40S", 8), ("g6e.12xlarge", "L40S", 4)]),
        ("4xL40S,boot=60s", 1, [("g6e.12xlarge", "L40S", 4)]),
        ("L40S,boot=60s,price=9", 1, [("g6e.48xlarge", "L40S", 8)]),
        ("8xB300,boot=60s,price=60", 1, [("8xB300", "B300", 8)]),
    ],
)
def test_each_instance_on_offer_that_holds_a_replica_is_a_pool(tmp_path, named, gpus, wanted):
    file = tmp_path / "p.yaml"
    model = f"chat,gpus={gpus},rate=3/s,cold=97s,restored=2s,demand=2,peak=3"
    typed("init", file, "--model", model, "--gpu", named)
    assert [(p.instance, p.gpu, p.gpus) for p in load(file).pools] == wanted


def test_everything_that_is_missing_is_named_in_one_run(tmp_path):
    said = typed("init", tmp_path / "p.yaml", "--model", "chat", "--gpu", "B300", code=2).stderr.splitlines()
    wanted = ("gpus=", "gpus=", "price=", "boot=", "rate=", "demand=", "cold=", "restored=")
    assert len(said) == len(wanted)
    for line, word in zip(said, wanted, strict=True):
        assert line.startswith("quickthaw: missing-option: --")
        assert word in line
    both = typed("init", tmp_path / "p.yaml", code=2).stderr
    assert "--model" in both and "--gpu" in both
    assert not (tmp_path / "p.yaml").exists()
    assert "known: name=…" in typed("init", tmp_path / "p.yaml", "--model", "chat,gpu=1", code=2).stderr
    wrong = typed(
        "init", tmp_path / "p.yaml", "--model", "chat,gpus=none,rate=3s", "--gpu", "H100,boot=1GiB", code=2
    ).stderr
    for word in ("expected a count", "'3s' is a duration", "'1GiB' is a memory"):
        assert word in wrong
    assert "expected a count" in typed("init", tmp_path / "p.yaml", "--model", "chat,gpus=²", code=2).stderr


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        ("A100", "A100-80GB or A100-40GB"),
        ("h100", "H100"),
        ("a100 80GB", "A100-80GB"),
        ("p4d", "p4de.24xlarge or p4d.24xlarge"),
        ("B300", ""),
    ],
)
def test_a_type_without_a_price_points_to_those_of_nearly_the_same_name(tmp_path, named, meant):
    words = ("--model", MODEL + ",demand=1,peak=2", "--gpu", f"{named},boot=60s")
    asked = [line for line in typed("init", tmp_path / "p.yaml", *words, code=2).stderr.splitlines() if named in line]
    assert any("gpus=" in line for line in asked) and any("price=" in line for line in asked)
    assert all((f"(did you mean {meant}?)" in line) if meant else ("mean" not in line) for line in asked)


def test_what_was_measured_here_is_found(tmp_path, home):
    entry = {"model": "/models/chat", "engine": "vllm", "at": "2026-01-01T00:00:00+00:00"}
    lines = [entry | {"kind": kind, "seconds": s} for kind, s in (("cold", 90), ("restored", 1.5), ("restored", 1.7))]
    (home / "lead-times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wake = entry | {"seconds": 0.4, "enter_s": 1.0, "memory_bytes": 70 * 2**30, "gpu_bytes": 0}
    (home / "wake-times.jsonl").write_text(json.dumps(wake) + "\n")
    file = tmp_path / "p.yaml"
    typed("init", file, "--model", "/models/chat,gpus=1,rate=2,demand=3,peak=4", "--gpu", "H100,boot=60s")
    assert "measured on this host: 1 cold, median 90s; 2 restored, median 1.6s" in file.read_text()
    service = load(file).services[0]
    assert (service.cold, service.restored) == ((90.0,), (1.5, 1.7))
    assert (service.standby, service.standby_memory) == ((0.4,), 70.0)


def test_a_damaged_measurement_is_named_and_not_taken_for_none(tmp_path, home):
    (home / "lead-times.jsonl").write_text("{\n{}\n")
    (home / "wake-times.jsonl").write_text('{"model": "/models/chat", "seconds": 0.4, "memory_bytes": "x"}\n')
    file, words = tmp_path / "p.yaml", ("--gpu", "H100,boot=60s", "--model")
    chat = "/models/chat,gpus=1,rate=2,demand=3,peak=4"
    said = typed("init", file, *words, chat, code=2).stderr
    assert said.count("lead-times.jsonl:1: ") == 2 and "none was measured" not in said
    typed("init", file, *words, chat + ",cold=97s,restored=2s")
    assert "wake-times.jsonl:1: memory_bytes is a count, not 'x'" in file.read_text()
    assert load(file).services[0].standby == ()


def test_questions_in_a_terminal(tmp_path):
    """Every question has one answer; an empty one ends a list, or takes the default."""
    answers = {
        "A model": "/models/chat",
        "A GPU": "8xB300",
        "8xB300: price": "60",
        "8xB300: how long": "170s 190s",
        "A CSV": "",
        "/models/chat: GPUs": "4",
        "/models/chat: what": "2/s",
        "/models/chat: requests": "3",
        "/models/chat: seconds of cold": "97s",
        "/models/chat: seconds of restored": "2s",
    }
    asked = []

    def ask(question, default):
        asked.append(question)
        if "empty: no more" in question:
            return ""
        found = [answer for start, answer in answers.items() if question.startswith(start)]
        return {"9 of 10 are below": "5"}.get(question[question.find("(") + 1 : -1], found[0] if found else default)

    text, problem = new_file.compose(tmp_path / "p.yaml", new_file.Answers([], []), ask)
    assert (
        next(q for q in asked if "GPU" in q) == "/models/chat: GPUs of a replica"
    )  # decides which instances are pools
    assert problem.pools[0].boot == (170.0, 190.0)
    assert problem.services[0].target_wait == 5.0
    assert problem.demand.forecasts["chat"].values == ((3.0,), (5.0,))
    assert "price: 60 $/h\n" in text
    assert len(asked) == len(set(asked))


def test_prices_of_ones_own(tmp_path):
    table = tmp_path / "prices.csv"
    table.write_text(
        "\ufeffinstance,gpu,gpus,price,memory,region\nbig,H100,8,16 $/h,80GiB,west\n"
    )  # as Excel writes it
    file = tmp_path / "p.yaml"
    words = ("--model", MODEL + ",demand=1,peak=2", "--gpu", "H100,boot=60s", "--prices", table)
    assert prices.SOURCE not in typed("init", file, *words, "--region", "west").stdout
    assert load(file).pools[0].price == 16.0
    assert "# prices.csv" in file.read_text()
    table.write_text("instance,gpu,gpus,price\nbig,H100,8,x\nsmall,H100,0,1\n")
    with pytest.raises(InputError) as caught:
        prices.offers(table)
    assert [error.line for error in caught.value.all] == [2, 3]
    table.write_text("instance,gpu\n")
    with pytest.raises(InputError, match="no column gpus, price"):
        prices.offers(table)
    with pytest.raises(InputError, match="cannot be read"):
        prices.offers(Path(tmp_path / "none.csv"))
