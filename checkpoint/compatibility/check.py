"""Identity of a launch: what selects a snapshot, and what must match for a safe restore.

`current_identity(...)` gathers it in a few milliseconds. `CurrentIdentity.key` names the snapshot that a launch needs: a digest over
engine, version, interpreter, arguments, environment, model and weights mode, so two different launches never share a
snapshot. `check` then compares the recorded identity with this one, and reports every difference by a stable code:

    format-newer  format-too-old      the snapshot's own layout          machine-differs  page-size-differs
    kernel-older  kernel-newer  kernel-unknown                           cpu-features-missing: avx512_bf16
    libc-differs                      the C library's version or build   criu-older
    engine-differs  engine-version-differs  engine-build-differs  interpreter-differs  dependency-differs: torch
    arguments-differ: --max-model-len environment-differs: OMP_NUM_THREADS   secret-differs: VLLM_API_KEY
    model-differs  weights-differ     the digest of the model's files; whether the weights are in the snapshot
    gpu-count-differs  gpu-model-differs  gpu-memory-smaller  driver-older  driver-newer

Policies. Kernel: the recorded release or a newer one, at most KERNEL_MAJOR_RANGE major versions ahead; patch levels
and vendor suffixes are ignored. CPU: every recorded feature that a program can use must be present; additional ones
are allowed. CRIU: the same version or newer. The GPU driver must be identical, because libcuda is in the images and
works only with its own kernel module.

Secrets are never stored. A relevant secret is kept as a digest under the snapshot's own random salt (anyone who can
read the salt can read the memory images, too). The key includes 16 bits of a secret's digest: enough to tell two
launches apart, too few to confirm a guess.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blake3
import msgspec

from checkpoint.compatibility.engine import EngineFacts, declared_variables, engine_facts, package_folders
from checkpoint.compatibility.environment import classify
from checkpoint.compatibility.gpu import Gpu
from checkpoint.compatibility.host import HostFacts, host_facts
from checkpoint.compatibility.inputs import Inputs
from checkpoint.compatibility.launch_options import Arguments, looks_secret, normalised_arguments, secret_names
from checkpoint.errors import Incompatible, Integrity
from checkpoint.snapshot.manifest import FORMAT
from lazyfs.content.records import ready

OLDEST_FORMAT = 2
"""The oldest snapshot layout (manifest.FORMAT) that can be restored. Snapshots of format 1 run vLLM in developer mode."""
NAMED_MISMATCHES = 3  # beside the first; the rest is counted
KERNEL_MAJOR_RANGE = 1
"""Maximum number of major versions by which a kernel may be newer than the one the snapshot was taken on."""
LOCALTIME = Path("/etc/localtime")

# Flags of /proc/cpuinfo (names as in the kernel's cpufeatures.h) on which no program's code path can depend: privileged
# instructions and modes, mitigations, clocks, power, performance counters, virtualisation, cache control; and hints
# about the speed of string instructions. All other flags count as instruction sets.
IGNORED_CPU_FLAGS = frozenset(
    [
        "acpi", "apic", "x2apic", "extapic", "x2avic", "avic", "aperfmperf", "arat", "art", "cpb", "de", "vme", "mca", "mce", "mtrr", "msr",
        "pat", "pge", "pse", "pse36", "pae", "nx", "sep", "ht", "hypervisor", "cpuid_fault", "osvw", "skinit", "wdt", "overflow_recov",
        "succor", "smca", "topoext", "xtopology", "extd_apicid", "amd_dcm", "nodeid_msr", "cmp_legacy", "cr8_legacy", "rep_good",
        "constant_tsc", "nonstop_tsc", "nonstop_tsc_s3", "tsc_adjust", "tsc_deadline_timer", "tsc_known_freq", "tsc_reliable", "tsc_scale",
        "est", "tm", "tm2", "ida", "epb", "dtherm", "dts", "pln", "pts", "hwp", "hwp_act_window", "hwp_epp", "hwp_notify", "hwp_pkg_req",
        "hw_pstate", "proc_feedback", "hfi", "cppc", "acc_power", "xtpr", "dca", "ds_cpl", "dtes64", "pbe", "pebs", "bts", "pdcm", "ibs",
        "arch_perfmon", "arch_lbr", "intel_pt", "perfctr_core", "perfctr_nb", "perfctr_llc", "perfmon_v2", "amd_lbr_v2", "sdbg", "irperf",
        "smx", "vmx", "svm", "ept", "ept_ad", "vpid", "vnmi", "flexpriority", "tpr_shadow", "npt", "lbrv", "svm_lock", "nrip_save",
        "vmcb_clean", "flushbyasid", "decodeassists", "pausefilter", "pfthreshold", "v_vmsave_vmload", "vgif", "v_spec_ctrl", "vmmcall",
        "sme", "sev", "sev_es", "sev_snp", "debug_swap", "tme", "pconfig", "tdx_guest", "sgx", "sgx_lc", "intel_ppin", "amd_ppin",
        "pti", "retpoline", "ssbd", "ssb_no", "virt_ssbd", "ibrs", "ibrs_enhanced", "auto_ibrs", "ibpb", "ibpb_brtype", "sbpb", "stibp",
        "stibp_always_on", "rsb_ctxsw", "md_clear", "flush_l1d", "l1d_flush", "arch_capabilities", "core_capabilities", "ibpb_exit_to_user",
        "rrsba_ctrl", "bhi_ctrl", "srso_no", "btc_no", "split_lock_detect", "bus_lock_detect",
        "invpcid", "invpcid_single", "pcid", "smep", "smap", "umip", "ss", "la57", "xsaves", "wbnoinvd", "xsaveerptr", "cqm", "cqm_llc",
        "cqm_occup_llc", "cqm_mbm_total", "cqm_mbm_local", "rdt_a", "cat_l2", "cat_l3", "cdp_l2", "cdp_l3", "mba", "bmec", "erms", "fsrm",
        "fzrm", "fsrs", "fsrc",
    ]
)  # fmt: skip


_COMPILERS = (
    "torch",
    "triton",
    "flashinfer_python",
    "sgl_kernel",
    "cuda_bindings",
    "nvidia_cuda_nvrtc",
    "nvidia_cuda_runtime",
    "llvmlite",
)


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The identity stored in a snapshot's manifest; it contains no secret.

    `secrets`: relevant secrets as digests under `salt` (hex). `secret_names`: names of all variables that look like
    secrets. `model`: digest of the model's files, "" if they are not on this host. `weights`: `included` or `excluded`.
    `renewed`: names of the engine's variables whose values are replaced in a restored engine
    (checkpoint.compatibility.environment).
    """

    format: int
    host: HostFacts
    engine: EngineFacts
    arguments: Arguments
    environment: dict[str, str]
    secrets: dict[str, str]
    secret_names: tuple[str, ...]
    salt: str
    model: str
    weights: str
    renewed: tuple[str, ...] = ()

    @classmethod
    def decode(cls, builtins: Mapping[str, Any]) -> Identity:
        """Decode a manifest's `identity`. Raises Integrity (identity-garbled) if it is invalid."""
        try:
            return msgspec.convert(builtins, ready(cls))
        except msgspec.ValidationError as error:
            raise Integrity(
                "identity-garbled", f"the snapshot's identity cannot be read ({error}); take a new snapshot"
            ) from error

    def encode(self) -> dict[str, Any]:
        """Encode it for a manifest's `identity`, with JSON types only."""
        return dict(msgspec.to_builtins(self))


class Mismatch(msgspec.Struct, frozen=True, order=True):
    """One reason against a restore. `code` is stable; `message` is one line for people."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} ({self.message})"


_WEIGHTS_IN_KEY = {"included": "full", "excluded": "thin"}
"""The words that a former version had for them: a key stays the same across versions."""


@dataclass(frozen=True)
class CurrentIdentity:
    """The identity of a launch on this host. It still contains the secrets; `record` digests them.

    `sketch` selects a snapshot by its model, `model` proves it (checkpoint.compatibility.model_files). `model` is "" until
    a snapshot has been found, or one is taken: reading all of a large model takes minutes.
    """

    host: HostFacts
    engine: EngineFacts
    arguments: Arguments
    environment: Mapping[str, str]
    sketch: str = ""
    model: str = ""
    weights: str = "included"
    secret_names: tuple[str, ...] = ()
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    renewed: Mapping[str, str] = field(default_factory=dict, repr=False)
    format: int = FORMAT

    @property
    def key(self) -> str:
        """24 hex digits over everything that selects a snapshot: the same on every host and in every process."""
        parts = {
            "engine": [self.engine.name, self.engine.version, self.engine.build],
            "interpreter": [self.engine.interpreter, self.engine.python],
            "arguments": self.arguments,
            "environment": dict(self.environment),
            "secrets": {name: blake3.blake3(value.encode()).hexdigest()[:4] for name, value in self.secrets.items()},
            "model": self.sketch,
            "weights": _WEIGHTS_IN_KEY.get(self.weights, self.weights),
        }
        return _digest_over("quickthaw identity 3", parts)[:24]

    @property
    def compile_cache(self) -> str:
        """Name of the archive for the engine's compile caches.

        It is usable wherever engine, compilers, CPUs and launch are the same. Arguments (LoRA, batch sizes), variables
        (threads) and the number of CPUs affect compiled code. The engines' own cache keys cover most of them, but not
        all; so code compiled for another launch or host is not used at all.
        """
        engine, host = self.engine, self.host
        parts = [
            *(engine.version, engine.build, engine.python, engine.python_build, engine.libc),
            {name: engine.packages.get(name, "") for name in _COMPILERS},
            host.machine,
            sorted(set(host.cpu_flags) - IGNORED_CPU_FLAGS),
            host.cpus,
            self.arguments,
            dict(self.environment),
            [[gpu.name for gpu in host.gpus], host.driver],
        ]
        return f"compile-{engine.name}-{_digest_over('quickthaw compile cache 2', parts)[:16]}"

    def record(self, salt: str | None = None) -> Identity:
        """Return the identity for a manifest, with secrets digested under `salt`.

        `salt` has 32 hex digits; by default it is new and random.
        """
        salt = secrets.token_hex(16) if salt is None else salt
        return Identity(
            format=self.format,
            host=self.host,
            engine=self.engine,
            arguments=self.arguments,
            environment=dict(self.environment),
            secrets={name: _salted(salt, name, value) for name, value in self.secrets.items()},
            secret_names=self.secret_names,
            salt=salt,
            model=self.model,
            weights=self.weights,
            renewed=tuple(sorted(self.renewed)),
        )


def _digest_over(purpose: str, parts: object) -> str:
    data = f"{purpose}\0".encode() + msgspec.json.encode(parts, order="deterministic")
    return blake3.blake3(data).hexdigest()


def current_identity(
    engine: str,
    interpreter: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    sketch: str = "",
    model_paths: Sequence[str] = (),
    model_folder: Path | None = None,
    cache: Path | None = None,
    weights: str = "included",
    criu: str = "",
    gpus: tuple[Gpu, ...] | None = None,
) -> CurrentIdentity:
    """Gather the identity of a launch on this host.

    `arguments`: the words after the engine's module, as the engine will receive them. `environment`: the engine's
    environment. `sketch`: the model's (ModelFiles.sketch). `model_paths`: possible names of its folder on the command
    line (see normalised_arguments). `model_folder`: that folder. `cache`: file that caches digests of large files
    between starts. `criu`: CRIU's version. `gpus`: those of this host; by default NVML is queried if there is a device.
    Raises HostLacks if the interpreter or the engine is missing.
    """
    folders = package_folders(interpreter)
    variables = classify(environment, engine, lambda names: declared_variables(engine, folders, names))
    inputs = Inputs(
        arguments,
        environment,
        model=model_folder,
        model_name=model_paths[0] if model_paths else "",
        modules=folders,
        cache=cache,
        engine=engine,
    )
    normalised = normalised_arguments(engine, arguments, model_paths, inputs)
    if code := inputs.remote_code():
        normalised["--trust-remote-code"] = (*normalised.get("--trust-remote-code", ()), (f"[{code}]",))
    hidden = {name: value for name, value in variables.relevant.items() if looks_secret(name, value)}
    relevant = dict(variables.relevant)
    for name, value in variables.relevant.items():
        if name not in hidden and (read := inputs.variable(name, value)):
            relevant[name] = f"{value} [{read}]"
    inputs.digests.save()
    if zone := _time_zone(environment):
        relevant[str(LOCALTIME)] = zone
    shown: Arguments = {}
    for flag, occurrences in normalised.items():
        if any(looks_secret(flag, value) for values in occurrences for value in values):
            hidden[flag] = "\0".join("\1".join(values) for values in occurrences)
        else:
            shown[flag] = occurrences
    return CurrentIdentity(
        host=host_facts(criu, gpus, environment),
        engine=engine_facts(engine, interpreter),
        arguments=shown,
        environment={name: value for name, value in relevant.items() if name not in hidden},
        sketch=sketch,
        weights=weights,
        secret_names=secret_names(environment),
        secrets=hidden,
        renewed=variables.renewed,
    )


def _time_zone(environment: Mapping[str, str]) -> str:
    """Return the host's time zone, which the C library reads once, unless TZ names another.

    Return "" for UTC or a missing file.
    """
    if environment.get("TZ") not in (None, str(LOCALTIME), f":{LOCALTIME}"):
        return ""
    try:
        data = LOCALTIME.read_bytes()
    except OSError:
        return ""
    # The last line of such a file is the rule that holds from now on (RFC 9636).
    rule = data.rstrip(b"\n").rpartition(b"\n")[2].decode("ascii", "replace")
    return "" if rule == "UTC0" else f"{rule} {blake3.blake3(data).hexdigest()[:16]}"


def check(recorded: Identity, now: CurrentIdentity) -> tuple[Mismatch, ...]:
    """Return every reason against restoring the snapshot for this launch, in a stable order; empty if it may be restored."""
    return (
        *check_host(recorded, now.host, now.format),
        *check_engine(recorded.engine, now.engine),
        *_check_launch(recorded, now),
    )


def refuse(mismatches: Sequence[Mismatch]) -> None:
    """Raise Incompatible with every code and the messages of the first four mismatches, if there is one."""
    if mismatches:
        first, *others = mismatches
        named = "".join(f"; {other.code}: {other.message}" for other in others[:NAMED_MISMATCHES])
        more = f", and {len(others) - NAMED_MISMATCHES} more" if len(others) > NAMED_MISMATCHES else ""
        raise Incompatible(
            first.code,
            f"{first.message}{named}{more}; a cold start takes a new snapshot",
            tuple(m.code for m in mismatches),
        )


def _differs(code: str, what: str, then: object, now: object) -> Mismatch:
    return Mismatch(code, f"{what}: {then} in the snapshot, {now} here")


def check_host(recorded: Identity, host: HostFacts, reads: int = FORMAT) -> tuple[Mismatch, ...]:
    """Run the part of `check` that needs no launch: layout, kernel, CPU, CRIU and GPUs."""
    then = recorded.host
    found: list[Mismatch] = []
    if recorded.format > reads:
        found.append(_differs("format-newer", "layout version", recorded.format, reads))
    elif recorded.format < OLDEST_FORMAT:
        found.append(_differs("format-too-old", "layout version", recorded.format, f"{OLDEST_FORMAT} to {reads}"))
    if then.machine != host.machine:
        found.append(_differs("machine-differs", "processor architecture", then.machine, host.machine))
    if then.page_size != host.page_size:
        found.append(_differs("page-size-differs", "page size", then.page_size, host.page_size))
    found += _check_kernel(then.kernel, host.kernel)
    if missing := sorted(set(then.cpu_flags) - set(host.cpu_flags) - IGNORED_CPU_FLAGS):
        code = f"cpu-features-missing: {' '.join(missing)}"
        found.append(Mismatch(code, f"taken on {then.cpu_model}, this host has {host.cpu_model}"))
    if then.criu and _numbers(host.criu) < _numbers(then.criu):
        found.append(_differs("criu-older", "CRIU", then.criu, host.criu or "none"))
    return (*found, *_check_gpus(then, host))


def _check_kernel(then: str, now: str) -> list[Mismatch]:
    was, here_ = _release(then), _release(now)
    if was is None or here_ is None:
        return [_differs("kernel-unknown", "kernel release (not a version number)", then, now)]
    if here_ < was:
        return [_differs("kernel-older", "kernel", then, now)]
    if here_[0] > was[0] + KERNEL_MAJOR_RANGE:
        return [_differs("kernel-newer", f"kernel (at most {KERNEL_MAJOR_RANGE} major version newer)", then, now)]
    return []


def same_cpu(then: HostFacts, host: HostFacts) -> bool:
    """Return whether two CPUs are the same by name and flags, so that no further comparison is needed."""
    return (then.cpu_model, then.cpu_flags) == (host.cpu_model, host.cpu_flags)


def _check_gpus(then: HostFacts, host: HostFacts) -> list[Mismatch]:
    if len(then.gpus) != len(host.gpus):
        return [_differs("gpu-count-differs", "visible GPUs", len(then.gpus), len(host.gpus))]
    found = []
    for index, (was, now) in enumerate(zip(then.gpus, host.gpus, strict=True)):
        if was.name != now.name:
            found.append(_differs("gpu-model-differs", f"GPU {index}", was.name, now.name))
        elif now.memory < was.memory:
            # The same model reports less memory with ECC or in a slice. More memory is fine.
            found.append(_differs("gpu-memory-smaller", f"MiB of GPU {index}", was.memory >> 20, now.memory >> 20))
    if then.gpus and then.driver != host.driver:
        code = "driver-older" if _numbers(host.driver) < _numbers(then.driver) else "driver-newer"
        found.append(_differs(code, "GPU driver", then.driver, host.driver or "none"))
    return found


def check_engine(then: EngineFacts, now: EngineFacts) -> tuple[Mismatch, ...]:
    """Run the part of `check` about the installation: engine, interpreter, C library and dependencies."""
    found: list[Mismatch] = []
    if then.name != now.name:
        found.append(_differs("engine-differs", "engine", then.name, now.name))
    elif then.version != now.version:
        found.append(_differs("engine-version-differs", then.name, then.version, now.version))
    elif then.build != now.build:
        found.append(_differs("engine-build-differs", f"files of {then.version}", then.build[:12], now.build[:12]))
    for what, a, b in (
        ("interpreter", then.interpreter, now.interpreter),
        ("Python", then.python, now.python),
        ("build of Python", then.python_build, now.python_build),
    ):
        if a != b:
            found.append(_differs("interpreter-differs", what, a, b))
            break
    if then.libc != now.libc:
        found.append(_differs("libc-differs", "C library", then.libc, now.libc))
    for name in sorted(then.packages.keys() | now.packages.keys()):
        a, b = then.packages.get(name, "absent"), now.packages.get(name, "absent")
        if a != b:
            found.append(_differs(f"dependency-differs: {name}", name, a, b))
    return tuple(found)


def check_model(then: str, now: str) -> tuple[Mismatch, ...]:
    """Run the part of `check` about the model: compare the digests of its files."""
    if then == now:
        return ()
    return (_differs("model-differs", "model files", then[:12] or "none", now[:12] or "none"),)


def _check_launch(recorded: Identity, now: CurrentIdentity) -> list[Mismatch]:
    found = [*check_model(recorded.model, now.model)]
    if recorded.weights != now.weights:
        found.append(_differs("weights-differ", "weights", recorded.weights, now.weights))
    for flag in sorted(recorded.arguments.keys() | now.arguments.keys()):
        a, b = recorded.arguments.get(flag), now.arguments.get(flag)
        if a != b:
            name = flag or "positional"
            found.append(_differs(f"arguments-differ: {name}", name, _shown(a), _shown(b)))
    for name in sorted(recorded.environment.keys() | now.environment.keys()):
        was, value = recorded.environment.get(name), now.environment.get(name)
        if was != value:
            then_shown, now_shown = ("unset" if v is None else repr(v) for v in (was, value))
            found.append(_differs(f"environment-differs: {name}", name, then_shown, now_shown))
    for name in sorted(recorded.secrets.keys() | now.secrets.keys()):
        digest = _salted(recorded.salt, name, now.secrets[name]) if name in now.secrets else ""
        if not hmac.compare_digest(recorded.secrets.get(name, ""), digest):
            why = "its value differs from the one at the snapshot, or only one of the two launches has it"
            found.append(Mismatch(f"secret-differs: {name}", why))
    return found


def _shown(occurrences: tuple[tuple[str, ...], ...] | None) -> str:
    if occurrences is None:
        return "not given"
    return ", ".join(" ".join(values) or "given" for values in occurrences)


def _salted(salt: str, name: str, value: str) -> str:
    return blake3.blake3(f"{name}\0{value}".encode(), key=blake3.blake3(salt.encode()).digest()).hexdigest()[:32]


def _release(kernel: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", kernel)
    return (int(match[1]), int(match[2])) if match else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
