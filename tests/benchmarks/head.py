"""The head against what the released recipe does (V = 151,936, T = 1024, d = 512).

The recipe keeps all logits and computes both of its scores on every row: the density of the candidates through a clone
and a full softmax, and the log-probability of the token; it then picks one per row. `one branch` in the details is the
first of them alone, the least that an implementation with all logits can do.

Time is the best CPU time of one thread (other work on the machine hardly moves it), memory the peak above the inputs
without the gradient of the weight, which both sides must produce; each memory case runs in a fresh process.
"""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from learner.head import candidate_logits, linear_lse_gather
from learner.likelihood import soft_log_density
from tests.benchmarks._timing import best_ratio, interleaved, median, median_ratio
from tests.benchmarks.row import Row

ROWS, VOCABULARY, WIDTH, CANDIDATES = 1024, 151_936, 512, 5
GPU_ROWS, GPU_WIDTH = 8192, 1536
ROUNDS = 2
GATE = 1e-4
TARGETS = {"soft": 30.0, "soft_memory": 100.0, "full": 0.95, "full_memory": 40.0, "trl": 1.05, "gpu_floor": 0.7}

logger = logging.getLogger(__name__)
Scores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def recipe(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor, *, soft: bool) -> Tensor:
    """Our own restatement of the released path for rows that are all soft or all discrete."""
    logits = (hidden @ weight.t()).float()
    density = _density_through_softmax(logits, ids, perturbed)
    categorical = logits.log_softmax(-1).gather(-1, ids[:, :1]).squeeze(-1)
    return torch.where(torch.full_like(categorical, soft, dtype=torch.bool), density, categorical)


def recipe_soft(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """The recipe on soft rows."""
    return recipe(hidden, weight, ids, perturbed, soft=True)


def recipe_discrete(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """The recipe on discrete rows."""
    return recipe(hidden, weight, ids, perturbed, soft=False)


def one_branch(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """The density alone."""
    return _density_through_softmax((hidden @ weight.t()).float(), ids, perturbed)


def _density_through_softmax(logits: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    q = logits.clone().softmax(-1).gather(-1, ids)
    log_q = torch.log(q / q.sum(-1, keepdim=True) + 1e-6)
    noise = (perturbed - log_q).clamp(-1.5, 3.0)
    counted = log_q > -3.0
    return ((-noise - torch.exp(-noise)) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def ours_soft(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """K dot products and the same density."""
    logits = candidate_logits(hidden, weight, ids)
    return soft_log_density(logits, perturbed, torch.ones_like(ids, dtype=torch.bool), likelihood="reference")


def ours_discrete(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """Log-probability of the first id over the vocabulary in slices."""
    at_ids, log_normaliser = linear_lse_gather(hidden, weight, ids[:, :1])
    return at_ids.squeeze(-1) - log_normaliser


def ours_with_entropy(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """The same with the entropy as a metric, which TRL's op always computes."""
    at_ids, log_normaliser, _ = linear_lse_gather(hidden, weight, ids[:, :1], entropy=True)
    return at_ids.squeeze(-1) - log_normaliser


CASES: dict[str, Scores] = {
    "recipe_soft": recipe_soft,
    "recipe_discrete": recipe_discrete,
    "one_branch": one_branch,
    "ours_soft": ours_soft,
    "ours_discrete": ours_discrete,
    "ours_with_entropy": ours_with_entropy,
}


def trl_op() -> Scores | None:
    """TRL's chunked log-prob op, None with a message where it is not installed."""
    try:
        function = importlib.import_module("trl.trainer.utils")._ChunkedLogProbFunction
    except (ImportError, AttributeError) as error:
        logger.warning("head/trl left out: TRL's chunked op is not available (%s)", error)
        return None
    chunk = 8192

    def scores(hidden: Tensor, weight: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
        log_prob: Tensor = function.apply(hidden, weight, None, ids[:, 0], 1.0, chunk)[0]
        return log_prob

    return scores


def make_inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, candidate ids, perturbed values drawn around the candidates' own logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (rows, CANDIDATES), generator=generator)
    with torch.no_grad():
        logits = candidate_logits(hidden, weight, ids)
        uniform = torch.rand(rows, CANDIDATES, generator=generator).clamp(1e-6, 1 - 1e-6)
        perturbed = logits.log_softmax(-1) - torch.log(-torch.log(uniform))
    return hidden, weight, ids, perturbed


def step(scores: Scores, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Forward and backward; gradients are dropped."""
    scores(*inputs).sum().backward()
    inputs[0].grad = inputs[1].grad = None


def error_against_float64(ours: Scores, recipe: Scores) -> float:
    """Largest relative error of values and gradients on 16 rows."""
    results = []
    for scores, dtype in ((ours, torch.float32), (recipe, torch.float64)):
        hidden, weight, ids, perturbed = make_inputs(16, dtype)
        if dtype == torch.float64:
            wide = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
            logits = wide[0] @ wide[1].t()
            value = scores_in_float64(recipe, logits, ids, perturbed)
            gradients = torch.autograd.grad(value.sum(), wide)
        else:
            value = scores(hidden, weight, ids, perturbed)
            gradients = torch.autograd.grad(value.sum(), (hidden, weight))
        results.append([value.detach().double(), *(gradient.double() for gradient in gradients)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))


def scores_in_float64(recipe: Scores, logits: Tensor, ids: Tensor, perturbed: Tensor) -> Tensor:
    """The definitions of the two recipes without any rounding to fp32."""
    if recipe is recipe_discrete:
        return logits.log_softmax(-1).gather(-1, ids[:, :1]).squeeze(-1)
    log_q = torch.log(logits.gather(-1, ids).softmax(-1) + 1e-6)
    noise = (perturbed.double() - log_q).clamp(-1.5, 3.0)
    counted = log_q > -3.0
    return ((-noise - torch.exp(-noise)) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def peak_bytes(case: str) -> int:
    """Peak resident memory of one step above its inputs, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.head", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return int(json.loads(done.stdout))


def measure_peak(case: str) -> int:
    """What `peak_bytes` runs: a tiny step first, so that libraries and threads are loaded, then the real one."""
    torch.set_num_threads(1)
    small = (torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True))
    step(CASES[case], (*small, torch.zeros(4, CANDIDATES, dtype=torch.int64), torch.zeros(4, CANDIDATES)))
    inputs = make_inputs(ROWS)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _status_bytes("VmRSS")
    step(CASES[case], inputs)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def run(names: set[str] | None) -> list[Row]:
    """Rows `head/soft`, `head/full`, `head/trl` (time), `head/*_memory`, and `head/gpu_floor` on a GPU."""
    wanted = {name.removeprefix("head/") for name in names} if names else set(TARGETS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = _time_rows(wanted) + _memory_rows(wanted)
    finally:
        torch.set_num_threads(threads)
    if "gpu_floor" in wanted:
        if torch.cuda.is_available():
            rows.append(_gpu_row())
        else:
            logger.warning("head/gpu_floor left out: no GPU")
    return rows


def _time_rows(wanted: set[str]) -> list[Row]:
    peers: dict[str, tuple[Scores, Scores]] = {}
    if "soft" in wanted:
        peers["soft"] = (recipe_soft, ours_soft)
    if "full" in wanted:
        peers["full"] = (recipe_discrete, ours_discrete)
    trl = trl_op() if "trl" in wanted else None
    if trl is not None:
        peers["trl"] = (trl, ours_with_entropy)
    if not peers:
        return []
    inputs = make_inputs(ROWS)
    measured = [one_branch, *(scores for pair in peers.values() for scores in pair)]
    actions = {str(id(scores)): partial(step, scores, inputs) for scores in measured}
    seconds = interleaved(actions, ROUNDS, clock=time.process_time)
    alone = min(seconds[str(id(one_branch))])
    gflop = 2 * ROWS * VOCABULARY * WIDTH / 1e9
    rows = []
    for name, (peer, ours) in peers.items():
        error = error_against_float64(ours, recipe_soft if ours is ours_soft else recipe_discrete)
        theirs_s, ours_s = seconds[str(id(peer))], seconds[str(id(ours))]
        ratio = best_ratio(theirs_s, ours_s) if error < GATE else 0.0
        detail = f"peer {min(theirs_s):.2f} s (one branch {alone:.2f} s), ours {min(ours_s):.3f} s"
        detail += f"; error {error:.0e} against float64"
        if name != "soft":
            detail += f"; {4 * gflop / min(ours_s):.0f} GFLOP/s of the 4 products it cannot avoid"
        rows.append(Row(f"head/{name}", ratio, TARGETS[name], detail))
    return rows


def _memory_rows(wanted: set[str]) -> list[Row]:
    gradient = VOCABULARY * WIDTH * 4
    pairs = {"soft_memory": ("recipe_soft", "ours_soft"), "full_memory": ("recipe_discrete", "ours_discrete")}
    rows = []
    for name, cases in pairs.items():
        if name not in wanted:
            continue
        theirs, ours, alone = (max(peak_bytes(case) - gradient, 2**20) for case in (*cases, "one_branch"))
        detail = (
            f"peak minus dW ({gradient / 2**20:.0f} MiB): peer {theirs / 2**20:.0f} MiB "
            f"(one branch {alone / 2**20:.0f} MiB), ours {ours / 2**20:.1f} MiB"
        )
        rows.append(Row(f"head/{name}", theirs / ours, TARGETS[name], detail))
    return rows


def _gpu_row() -> Row:
    """The full head in bf16 against nothing but its four matrix products (forward, recompute, dhidden, dweight)."""
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").mul_(0.05).to(torch.bfloat16)

    hidden, weight = random(GPU_ROWS, GPU_WIDTH).requires_grad_(), random(VOCABULARY, GPU_WIDTH).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (GPU_ROWS, 1), device="cuda")
    inputs = (hidden, weight, ids, ids.float())
    dlogits = random(GPU_ROWS, VOCABULARY)

    def products() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.t(), out=dlogits)
            torch.mm(hidden, weight.t(), out=dlogits)
            torch.mm(dlogits, weight)
            torch.mm(dlogits.t(), hidden)

    def synchronised(action: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            action()
            torch.cuda.synchronize()

        return timed

    seconds = interleaved(
        {"floor": synchronised(products), "ours": synchronised(lambda: step(ours_discrete, inputs))}, 10
    )
    detail = f"products {1e3 * median(seconds['floor']):.1f} ms, ours {1e3 * median(seconds['ours']):.1f} ms, bf16"
    return Row("head/gpu_floor", median_ratio(seconds["floor"], seconds["ours"]), TARGETS["gpu_floor"], detail)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_peak(sys.argv[1])))
