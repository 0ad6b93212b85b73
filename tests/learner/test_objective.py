"""The objective: against a naive definition, and equal for every packing, order and number of ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaForCausalLM

from learner.aggregation import AGGREGATIONS, sequence_weights
from learner.attention import attention_inputs, use_packed_attention
from learner.diagnostics import SUMS, Statistics
from learner.embedding import replay_embeddings
from learner.objective import ObjectiveSettings, objective, score_positions
from learner.packing import ReplayBatch, ScoredLogits, plan_packs
from rollout.trajectory import Kind
from tests.learner.sequences import VOCABULARY, Replayed, pack, random_sequences
from tests.tiny_models import tiny_llama

LENGTHS = [7, 12, 2, 19, 5, 9]
LIKELIHOODS = ["reference", "gumbel", "concrete", "censored", "argmax", "none"]


def tiny_model(dtype: torch.dtype, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = tiny_llama(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0, 0.5)
    return model


def weights_of(sequences: list[Replayed], kind: str) -> list[float]:
    lengths = torch.tensor([len(s.ids) for s in sequences])
    return sequence_weights(lengths, kind=kind, constant_length=32).tolist()  # type: ignore[arg-type]


def hidden_states(model: LlamaForCausalLM, batch: ReplayBatch, *, packed: bool = True) -> Tensor:
    table = model.get_input_embeddings().weight
    embedded = replay_embeddings(table, batch.input_ids, batch.mixture_rows, batch.mixture_ids, batch.mixture_weights)
    boundaries = attention_inputs(batch.cu_seqlens) if packed else {}
    output = model.model(
        inputs_embeds=embedded[None], position_ids=batch.position_ids[None], use_cache=False, **boundaries
    )
    return output[0][0][batch.rows]


def with_references(
    batch: ReplayBatch, reference: LlamaForCausalLM, settings: ObjectiveSettings, *, packed: bool
) -> ReplayBatch:
    with torch.no_grad():
        hidden = hidden_states(reference, batch, packed=packed)
        scores = score_positions(hidden, reference.lm_head.weight, batch, keep=settings.keeps_states)
    return replace(batch, reference=scores, old=scores)


def run(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    batches: list[ReplayBatch],
    settings: ObjectiveSettings,
    *,
    packed: bool,
) -> tuple[Tensor, list[Tensor], Statistics]:
    """Loss, gradients and statistics of some passes."""
    model.zero_grad()
    total, statistics = torch.zeros((), dtype=torch.float64), []
    for batch in batches:
        batch = with_references(batch, reference, settings, packed=packed)
        loss, part = objective(
            hidden_states(model, batch, packed=packed),
            model.lm_head.weight,
            batch,
            settings,
            reference_weight=reference.lm_head.weight.detach(),
        )
        loss.backward()
        total += loss.detach()
        statistics.append(part)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    return total, gradients, Statistics.merged(statistics)


SETTINGS = ObjectiveSettings(
    likelihood="censored",
    kl_coefficient=0.1,
    kl_estimator="exact",
    entropy_bonus=0.02,
    importance_cap=2.0,
    dual_clip=3.0,
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("aggregation", list(AGGREGATIONS))
@pytest.mark.parametrize(("kind", "estimator"), [("ppo", "exact"), ("gspo", "exact_vocabulary")])
def test_packed_equals_unpacked(
    dtype: torch.dtype, tolerance: float, aggregation: str, kind: str, estimator: str
) -> None:
    """Loss and gradients, for several budgets, orders and numbers of ranks; stock attention on the unpacked side."""
    settings = replace(SETTINGS, policy_loss=kind, kl_estimator=estimator)  # type: ignore[arg-type]
    sequences = random_sequences(LENGTHS, dtype=dtype)
    weights = weights_of(sequences, aggregation)
    model, reference = tiny_model(dtype), tiny_model(dtype, seed=1)
    single = [pack([s], [w]) for s, w in zip(sequences, weights, strict=True)]
    loss, gradients, statistics = run(model, reference, single, settings, packed=False)
    for module in (model, reference):
        use_packed_attention(module)
    for budget, ranks, order in itertools.product((30, 200), (1, 2), (1, -1)):
        plan = plan_packs([s.num_rows for s in sequences], token_budget=budget, num_ranks=ranks)
        batches = [
            pack([sequences[i] for i in chosen[::order]], [weights[i] for i in chosen[::order]])
            for passes in plan
            for chosen in passes
        ]
        other_loss, other_gradients, other_statistics = run(model, reference, batches, settings, packed=True)
        assert float(other_loss) == pytest.approx(float(loss), rel=tolerance)
        for gradient, expected in zip(other_gradients, gradients, strict=True):
            assert float((gradient - expected).norm()) <= tolerance * float(expected.norm())
        torch.testing.assert_close(other_statistics.sums, statistics.sums, atol=1e-3, rtol=1e-3)


def naive_loss(
    hidden: Tensor,
    weight: Tensor,
    old_hidden: Tensor,
    old_weight: Tensor,
    batch: ReplayBatch,
    beta: float,
    kl_over_candidates: bool,
) -> Tensor:
    """GRPO with the censored likelihood and exact KL, position by position from full logits (all in float64)."""
    total = torch.zeros((), dtype=torch.float64)
    soft_seen = 0
    for n in range(len(batch.rows)):
        new = hidden[n] @ weight.t() / batch.temperature[n]
        old = (old_hidden[n] @ old_weight.t() / batch.temperature[n]).detach()
        if batch.kinds[n] == Kind.SOFT:
            ids = batch.candidate_ids[soft_seen][batch.retained[soft_seen]]
            g = batch.perturbed[soft_seen][batch.retained[soft_seen]]
            t = batch.threshold[soft_seen]
            soft_seen += 1
            l_new, l_old = new[ids].log_softmax(-1), old[ids].log_softmax(-1)
            active = g >= t
            unseen_new, unseen_old = (1 - value[active].exp().sum() for value in (l_new, l_old))
            rates = [
                (value[active] - g[active]).exp().sum() + unseen * torch.exp(-t)
                for value, unseen in ((l_new, unseen_new), (l_old, unseen_old))
            ]
            log_ratio = (l_new - l_old)[active].sum() - active.sum() * (rates[0].log() - rates[1].log())
            support = ids if kl_over_candidates else slice(None)
            kl = kl_divergence(Categorical(logits=new[support]), Categorical(logits=old[support]))
        else:
            log_ratio = (new.log_softmax(-1) - old.log_softmax(-1))[batch.ids[n]]
            kl = kl_divergence(Categorical(logits=new), Categorical(logits=old))
        ratio, advantage = log_ratio.exp(), batch.advantages[n]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
        if advantage < 0:
            loss = torch.minimum(loss, -3 * advantage)
        total = total + batch.weights[n] * (loss + beta * kl)
    return total


@pytest.mark.parametrize("estimator", ["exact", "exact_vocabulary"])
def test_against_the_naive_definition(estimator: str) -> None:
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(len(batch.rows), 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCABULARY, 8, generator=generator, dtype=torch.float64).requires_grad_()
    before, old_weight = hidden.detach() * 1.05, weight.detach() + 0.05
    settings = ObjectiveSettings(likelihood="censored", kl_coefficient=0.3, kl_estimator=estimator)  # type: ignore[arg-type]
    scores = score_positions(before, old_weight, batch, keep=settings.keeps_states)
    batch = replace(batch, old=scores, reference=scores)
    loss, statistics = objective(hidden, weight, batch, settings, reference_weight=old_weight)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    over_candidates = estimator == "exact"
    expected = naive_loss(hidden, weight, before, old_weight, batch, beta=0.3, kl_over_candidates=over_candidates)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-10)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-9)
    metrics = statistics.metrics()
    assert 0 < metrics["objective/clip_fraction_thinking"] < 1
    assert metrics["objective/policy_loss"] + metrics["objective/kl_loss"] == pytest.approx(float(loss.detach()))


def random_head(batch: ReplayBatch) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(batch.rows), 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCABULARY, 8, generator=generator, dtype=torch.float64).requires_grad_()
    return hidden, weight


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_first_mini_batch_has_ratio_exactly_one(likelihood: str, stored: bool) -> None:
    """Under `recompute`: without a stored pass, and with one of the same policy."""
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    hidden, weight = random_head(batch)
    if stored:
        batch = replace(batch, old=score_positions(hidden, weight, batch))
    _, statistics = objective(hidden, weight, batch, ObjectiveSettings(likelihood=likelihood))  # type: ignore[arg-type]
    metrics = statistics.metrics()
    parts = ["answer"] if likelihood == "none" else ["thinking", "answer"]
    for part in parts:
        assert metrics[f"objective/ratio_mean_{part}"] == 1.0
        assert metrics[f"objective/effective_sample_size_{part}"] == 1.0
        assert metrics[f"objective/clip_fraction_{part}"] == 0.0
    assert metrics["objective/ratio_max"] == 1.0


@pytest.mark.parametrize("kind", ["ppo", "sapo", "cispo", "gspo"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("old", ["recompute", "behaviour"])
def test_every_combination_has_finite_gradients(kind: str, likelihood: str, old: str) -> None:
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "sequence_mean"))
    hidden, weight = random_head(batch)
    for estimator in ("k3", "exact", "exact_vocabulary"):
        settings = ObjectiveSettings(
            likelihood=likelihood,  # type: ignore[arg-type]
            policy_loss=kind,  # type: ignore[arg-type]
            old_log_density=old,  # type: ignore[arg-type]
            kl_estimator=estimator,  # type: ignore[arg-type]
            kl_coefficient=0.1,
            entropy_bonus=0.01,
            importance_cap=2.0,
        )
        reference = score_positions(hidden.detach() + 0.1, weight, batch, keep=settings.keeps_states)
        loss, _ = objective(
            hidden, weight, replace(batch, reference=reference), settings, reference_weight=weight.detach()
        )
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert gradient.isfinite().all()
            assert gradient.abs().sum() > 0


def test_likelihood_none_leaves_soft_positions_out() -> None:
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    hidden, weight = random_head(batch)
    reference = score_positions(hidden.detach() + 0.1, weight, batch)
    settings = ObjectiveSettings(likelihood="none", kl_coefficient=0.1, entropy_bonus=0.1)
    loss, statistics = objective(hidden, weight, replace(batch, reference=reference), settings)
    (gradient,) = torch.autograd.grad(loss, hidden)
    soft = batch.kinds == Kind.SOFT
    assert torch.equal(gradient[soft], torch.zeros_like(gradient[soft]))
    assert (gradient[~soft].abs().sum(-1) > 0).all()
    assert statistics.metrics()["objective/positions_thinking"] == int((batch.kinds == Kind.ENDED).sum())


def test_leaving_out_zero_advantage_sequences_changes_nothing() -> None:
    """They count in the mean, but they need not be computed when nothing else has a gradient there."""
    sequences = random_sequences(LENGTHS)
    sequences = [replace(s, advantage=0.0) if number % 2 else s for number, s in enumerate(sequences)]
    weights = weights_of(sequences, "token_mean")
    everything = pack(sequences, weights)
    needed = pack(sequences[::2], weights[::2])
    hidden, weight = random_head(everything)
    kept = torch.isin(everything.sequence, torch.tensor([0, 2, 4]))
    settings = ObjectiveSettings(likelihood="concrete", old_log_density="behaviour")
    complete, _ = objective(hidden, weight, everything, settings)
    partial, _ = objective(hidden[kept], weight, needed, settings)
    torch.testing.assert_close(partial, complete, atol=1e-14, rtol=1e-12)
    for gradient, expected in zip(
        torch.autograd.grad(partial, (hidden, weight)), torch.autograd.grad(complete, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-13, rtol=1e-10)


def test_a_pass_without_soft_or_without_discrete_positions() -> None:
    sequences = random_sequences([6, 9])
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    settings = ObjectiveSettings(likelihood="censored", entropy_bonus=0.1)
    for wanted in (batch.kinds == Kind.SOFT, batch.kinds == Kind.DISCRETE, torch.zeros(15, dtype=torch.bool)):
        names = ("rows", "sequence", "kinds", "ids", "temperature", "advantages", "weights", "behaviour_log_prob")
        part = replace(batch, **{name: getattr(batch, name)[wanted] for name in names})
        if not (part.kinds == Kind.SOFT).any():
            soft = ("candidate_ids", "perturbed", "retained", "threshold", "behaviour_logprobs", "top_weight")
            part = replace(part, **{name: getattr(part, name)[:0] for name in soft})
        hidden, weight = random_head(part)
        loss, statistics = objective(hidden, weight, part, settings)
        loss.backward()
        assert weight.grad.isfinite().all()
        assert math.isfinite(statistics.metrics()["objective/policy_loss"])


def test_mismatch_between_engine_and_learner() -> None:
    """Behaviour values that are the learner's own give no gap; a known error gives its size."""
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    hidden, weight = random_head(batch)
    own = score_positions(hidden, weight, batch)
    logprobs = own.candidate_logits.masked_fill(~batch.retained, -torch.inf).log_softmax(-1)
    exact = replace(batch, behaviour_logprobs=logprobs, behaviour_log_prob=own.log_prob)
    settings = ObjectiveSettings(likelihood="censored", importance_cap=1.5)
    metrics = objective(hidden, weight, exact, settings)[1].metrics()
    for part in ("thinking", "answer"):
        assert metrics[f"mismatch/max_{part}"] == pytest.approx(0, abs=1e-12)
        assert metrics[f"mismatch/effective_sample_size_{part}"] == pytest.approx(1)
    assert metrics["objective/importance_weight"] == pytest.approx(1)
    wrong = replace(exact, behaviour_log_prob=own.log_prob - torch.where(batch.kinds == Kind.DISCRETE, 0.3, 0.0))
    metrics = objective(hidden, weight, wrong, settings)[1].metrics()
    assert metrics["mismatch/max_answer"] == pytest.approx(0.3)
    assert metrics["mismatch/kl_answer"] == pytest.approx(math.exp(0.3) - 1 - 0.3)
    assert metrics["mismatch/max_thinking"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("likelihood", ["censored", "gumbel"])
def test_behaviour_values_replace_the_old_forward_pass(likelihood: str) -> None:
    """`behaviour` equals `recompute` whose old scores are those that the engine recorded."""
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    hidden, weight = random_head(batch)
    settings = ObjectiveSettings(likelihood=likelihood, old_log_density="behaviour")  # type: ignore[arg-type]
    loss, _ = objective(hidden, weight, batch, settings)
    recorded = ScoredLogits(batch.behaviour_logprobs, batch.behaviour_log_prob)
    recomputed, _ = objective(
        hidden, weight, replace(batch, old=recorded), replace(settings, old_log_density="recompute")
    )
    torch.testing.assert_close(loss, recomputed)
    on_policy, _ = objective(hidden, weight, batch, replace(settings, old_log_density="recompute"))
    assert abs(float(on_policy.detach()) - float(loss.detach())) > 1e-3


def test_importance_weights_multiply_the_policy_loss() -> None:
    """The engine gave every discrete token e^-0.2 (e^-5) less than the learner does: weight e^0.2 (the cap)."""
    sequences = random_sequences(LENGTHS)
    batch = pack(sequences, weights_of(sequences, "token_mean"))
    hidden, weight = random_head(batch)
    own = score_positions(hidden, weight, batch)
    logprobs = own.candidate_logits.masked_fill(~batch.retained, -torch.inf).log_softmax(-1)
    discrete = batch.kinds == Kind.DISCRETE
    losses = -batch.advantages * batch.weights  # ppo at ratio 1
    for gap, expected_weight in ((0.2, math.exp(0.2)), (5.0, 2.0)):
        recorded = own.log_prob - torch.where(discrete, gap, 0.0)
        observed = replace(batch, behaviour_logprobs=logprobs, behaviour_log_prob=recorded)
        loss, statistics = objective(hidden, weight, observed, ObjectiveSettings(importance_cap=2.0))
        weights = torch.where(discrete, expected_weight, 1.0)
        torch.testing.assert_close(loss, (losses * weights).sum())
        assert statistics.metrics()["objective/importance_weight"] == pytest.approx(float(weights.mean()))
        unweighted, _ = objective(hidden, weight, observed, ObjectiveSettings())
        torch.testing.assert_close(unweighted, losses.sum())
        clipped = ObjectiveSettings(old_log_density="behaviour")
        once, _ = objective(hidden, weight, observed, clipped)
        capped, _ = objective(hidden, weight, observed, replace(clipped, importance_cap=2.0))
        assert torch.equal(once, capped)


def test_soft_statistics_and_unknown_names() -> None:
    sequences = random_sequences([8])
    batch = pack(sequences, [1.0])
    hidden, weight = random_head(batch)
    metrics = objective(hidden, weight, batch, ObjectiveSettings())[1].metrics()
    active = (sequences[0].weights > 0).sum(-1).double().mean()
    assert metrics["soft/active_candidates"] == pytest.approx(float(active))
    assert metrics["soft/top_weight"] == pytest.approx(float(sequences[0].weights.amax(-1).mean()))
    single = (sequences[0].retained.sum(-1) == 1).double().mean()
    assert metrics["soft/single_candidate"] == pytest.approx(float(single))
    with pytest.raises(KeyError, match="rubbish"):
        Statistics.of({"rubbish": torch.zeros(())})
    assert Statistics.empty().metrics()["objective/policy_loss"] == 0.0
    assert len(SUMS) == len(set(SUMS))


def test_kl_needs_a_reference() -> None:
    sequences = random_sequences([8])
    batch = pack(sequences, [1.0])
    hidden, weight = random_head(batch)
    with pytest.raises(ValueError, match=r"needs ReplayBatch\.reference"):
        objective(hidden, weight, batch, ObjectiveSettings(kl_coefficient=0.1))
    scored = replace(batch, reference=score_positions(hidden, weight, batch))
    with pytest.raises(ValueError, match="exact KL needs"):
        objective(hidden, weight, scored, ObjectiveSettings(kl_coefficient=0.1, kl_estimator="exact"))
