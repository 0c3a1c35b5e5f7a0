"""Sampling by vLLM (Kwon et al. 2023, arXiv:2309.06180), behind the same call as ``sampler.sample``.

vLLM runs in this process with a second copy of the weights, in its own layout. Every call hands the policy's present
weights over in memory, forgets what was cached of older ones, and then samples; nothing is restarted and no weights go
through the disk. What is drawn with is vLLM's arithmetic, not the trainer's: ``sampler_logprobs`` agree with it up to
rounding, and ``kl/sampler`` says how far.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any

import torch
from torch import nn

from palate.errors import ConfigError, ModelError
from palate.generation.checks import check_request, check_room, context_length
from palate.generation.decode import Drawn
from palate.generation.sampler import _seed, _tokens
from palate.generation.settings import SamplingSettings
from palate.generation.uniform import uniforms
from palate.generation.vllm_model import cache_bytes, kind_of, named, served_weights, write_config
from palate.generation.vllm_process import as_before, random_numbers_kept, vllm_errors
from palate.generation.voices import _eval_mode
from palate.models.forward import token_logprobs
from palate.types import Tokens

# Mean difference, nats a token, from the trainer's log-probs that rounding explains; other weights are far beyond it.
_ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}
_CPU = torch.device("cpu")  # where vLLM's answers are


class VllmSampler:
    """``sampler.sample`` as vLLM does it; the engine is made by the first call and kept.

    An engine is for one architecture in one dtype: a policy while it is trained, say.

    Args:
        max_length: tokens of prompt and response together that the engine keeps room for; None = the model's context.
            With ``max_batch_rows`` of the first call it sets the size of the cache.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self.max_length = max_length
        self._engine: _Engine | None = None
        self._alone = Lock()  # a call brings its own weights: another must not come between them and the samples

    def __call__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        *,
        samples_per_prompt: int = 1,
        stop_token_ids: Sequence[int],
        generator: torch.Generator,
        max_batch_rows: int = 64,
        records: Sequence[Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
        other: nn.Module | None = None,
        mixture: float = 0.0,
        numbers: Sequence[tuple[int, int]] | None = None,
        max_length: int | None = None,
    ) -> Tokens:
        """As ``sampler.sample``, with the same arguments, result and errors, but:

        * ``other`` and ``mixture`` are refused: vLLM runs one model.
        * Each (prompt, sample) has a seed of its own, a function of the generator's state; yet the draws are not those
          of the embedded sampler, and a sample may change with the rows beside it, where rounding tips a draw.
        * ``max_batch_rows`` of the first call holds for all.
        """
        if hasattr(model, "context") or mixture:  # a reference that is the policy with its adapter off; a second voice
            raise ConfigError(
                'engine: "vllm" samples the policy alone; it cannot draw from a reference or a mixture with one. '
                "Set engine=embedded."
            )
        limits = [context_length(model), self.max_length, max_length]
        context = min(limit for limit in limits if limit is not None)
        check_request(model, prompts, samples_per_prompt, stop_token_ids, max_batch_rows, records)
        check_room(prompts, context, records)
        seed = _seed(generator) if settings.temperature else None
        if not prompts:
            return _tokens(prompts, samples_per_prompt, Drawn.empty(0, 1, _CPU), _device(model), records)
        with self._alone:
            first = self._engine is None
            if self._engine is None:
                longest = min(context_length(model), self.max_length or context_length(model))
                self._engine = _Engine(model, longest, max_batch_rows)
            self._engine.take_weights(model)
            requests = _requests(
                [len(prompt) for prompt in prompts],
                settings,
                copies=samples_per_prompt,
                stop=sorted(set(stop_token_ids)),
                context=context,
                seeds=_seeds(seed, numbers or [(p, 0) for p in range(len(prompts))], samples_per_prompt),
            )
            rows = [list(prompt) for prompt in prompts for _ in range(samples_per_prompt)]
            drawn = self._engine.draw(rows, requests, settings, set(stop_token_ids), progress)
        tokens = _tokens(prompts, samples_per_prompt, drawn, _device(model), records)
        if first:
            _check_first_look(model, tokens, settings)
        return tokens


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _seeds(seed: int | None, numbers: Sequence[tuple[int, int]], copies: int) -> list[int | None]:
    """Of each row, a function of the call's seed and the row's (prompt, sample) number; None where nothing is drawn."""
    if seed is None:
        return [None] * (len(numbers) * copies)
    place = torch.tensor(numbers).repeat_interleave(copies, 0)
    sample = place[:, 1] + torch.arange(copies).repeat(len(numbers))
    return [int(x * 2**52) for x in uniforms(seed, place[:, 0], sample, 1)[:, 0].tolist()]


def _requests(
    lengths: Sequence[int],
    settings: SamplingSettings,
    *,
    copies: int,
    stop: list[int],
    context: int,
    seeds: Sequence[int | None],
) -> list[Any]:
    """vLLM's settings of each row. The engine divides the logits by the temperature itself; see ``_Engine``."""
    from vllm import SamplingParams

    limits = [min(settings.max_new_tokens, context - length) for length in lengths for _ in range(copies)]
    return [
        SamplingParams(
            temperature=1.0 if settings.temperature else 0.0,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_tokens=min(settings.min_new_tokens, limit),
            max_tokens=limit,
            stop_token_ids=stop,
            ignore_eos=True,  # what ends a response is the caller's to say, not the model folder's
            detokenize=False,
            logprobs=0,  # the drawn token's only
            seed=seed,
        )
        for limit, seed in zip(limits, seeds, strict=True)
    ]


class _Engine:
    """vLLM's ``LLM`` for the architecture of a policy.

    Log-probs are to be log-softmax(logits / temperature) before anything is cut off. vLLM offers them before the
    temperature ("raw") or after top-k and top-p ("processed"); so the logits are divided where the model makes them,
    vLLM samples at temperature 1, and its raw log-probs are the ones wanted.
    """

    def __init__(self, model: nn.Module, max_length: int, rows: int) -> None:
        self.temperature = 1.0
        self.kind = kind_of(model)
        with as_before(), tempfile.TemporaryDirectory() as folder:
            from vllm import LLM
            from vllm.platforms import current_platform

            device = _device(model)
            if current_platform.device_type != device.type or device.index:
                raise ConfigError(
                    f'engine: "vllm" is built for {current_platform.device_type}:0 here, and the policy is on {device}. '
                    f"Set device={current_platform.device_type}, or engine=embedded."
                )
            write_config(model, folder)
            with vllm_errors("cannot serve this model"):
                self.llm = LLM(
                    folder,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    load_format="dummy",  # the weights come by take_weights
                    dtype=str(self.kind[1]).removeprefix("torch."),
                    max_model_len=max_length,
                    max_num_seqs=rows,
                    kv_cache_memory_bytes=cache_bytes(model, max_length, rows, self.kind[1]),
                    gpu_memory_utilization=0.05,  # of no effect beside the line above, but checked: it must be free
                    logprobs_mode="raw_logprobs",
                    enforce_eager=device.type == "cpu",  # compiling takes minutes there
                    seed=0,  # every request has its own
                )
                (self.parts,) = self.llm.apply_model(self._divide_logits)

    def _divide_logits(self, served: Any) -> set[str]:
        """Of vLLM's model; returns the names of its parts."""
        plain = served.compute_logits

        def compute_logits(*args: Any, **kwargs: Any) -> Any:
            logits = plain(*args, **kwargs)
            return logits if self.temperature == 1 or logits is None else logits.float() / self.temperature

        served.compute_logits = compute_logits
        return {name for name, _ in served.named_children()}

    def take_weights(self, model: nn.Module) -> None:
        """The model's weights, whatever they are now, into the engine; what was computed with older ones is forgotten."""
        if kind_of(model) != self.kind:
            raise ModelError(f"the engine was made for {named(self.kind)} and is given {named(kind_of(model))}.")
        with torch.no_grad(), vllm_errors("cannot take the weights"):
            weights = iter(served_weights(model, self.parts).items())
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            forgotten = self.llm.reset_prefix_cache()
        assert forgotten, "a request of an earlier call still runs"

    def draw(
        self,
        rows: Sequence[list[int]],
        requests: Sequence[Any],
        settings: SamplingSettings,
        stop: set[int],
        progress: Callable[[int, int], None] | None,
    ) -> Drawn:
        """A response to each row of token ids, in the rows' order."""
        self.temperature = settings.temperature or 1.0
        drawn = Drawn.empty(len(rows), settings.max_new_tokens, _CPU)
        engine = self.llm.llm_engine
        with torch.no_grad(), random_numbers_kept(), vllm_errors("cannot sample"):
            names = self.llm.enqueue([{"prompt_token_ids": ids} for ids in rows], list(requests), use_tqdm=False)
            try:
                found = list(_finished(engine, len(rows), progress))
            except BaseException:  # an interrupt too: nothing may be left for the next call
                engine.abort_request(names, internal=True)
                raise
        for row, output in enumerate(sorted(found, key=lambda output: int(output.request_id))):
            response = output.outputs[0]
            ids, length = list(response.token_ids), len(response.token_ids)
            drawn.ids[row, :length] = torch.tensor(ids)
            drawn.logprobs[row, :length] = torch.tensor(
                [step[token].logprob for step, token in zip(response.logprobs, ids, strict=True)]
            )
            drawn.length[row], drawn.finished[row] = length, ids[-1] in stop
        return drawn


def _finished(engine: Any, rows: int, progress: Callable[[int, int], None] | None) -> Iterator[Any]:
    ended = 0
    while engine.has_unfinished_requests():
        done = [output for output in engine.step() if output.finished]
        ended += len(done)
        if done and progress is not None:
            progress(ended, rows)
        yield from done


@torch.no_grad()
def _check_first_look(model: nn.Module, tokens: Tokens, settings: SamplingSettings, rows: int = 4) -> None:
    """The first samples are those of the model that was given, to the trainer's own eye.

    Raises:
        ModelError: vLLM runs another function: weights that it did not take, or another reading of the architecture.
    """
    some = tokens.select(torch.arange(min(rows, len(tokens)), device=tokens.ids.device))
    with _eval_mode(model):
        expected = token_logprobs(model, some, temperature=settings.temperature or 1.0)
    mask, dtype = some.response_mask, kind_of(model)[1]
    found: Any = some.extras["sampler_logprobs"]
    apart = float((found - expected)[mask].abs().mean())
    if not apart <= _ROUNDING[dtype]:  # NaN is not within it
        raise ModelError(
            f"vLLM's log-probabilities of its first samples are {apart:.3g} nats a token from the trainer's, expected at most "
            f"{_ROUNDING[dtype]:g} in {str(dtype).removeprefix('torch.')}: it runs {kind_of(model)[0]} in another way, or did "
            "not take all of its weights. Set engine=embedded."
        )
