"""Sampling by vLLM (Kwon et al. 2023, arXiv:2309.06180), behind the same call as ``sampler.sample``.

vLLM runs in this process with a second copy of the weights, in its own layout. Every call hands the policy's present
weights over in memory, forgets what was cached of older ones, and then samples; nothing is restarted and no weights go
through the disk. What is drawn with is vLLM's arithmetic, not the trainer's: ``sampler_logprobs`` agree with it up to
rounding, and ``kl/sampler`` says how far.
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palate.errors import ConfigError, ModelError
from palate.generation.checks import check_request, check_room, context_length
from palate.generation.decode import Drawn
from palate.generation.sampler import _seed, _tokens
from palate.generation.settings import SamplingSettings
from palate.generation.uniform import uniforms
from palate.generation.voices import _eval_mode
from palate.models.adapters import is_adapted, merged_weights
from palate.models.forward import token_logprobs
from palate.models.heads import base_of
from palate.models.quiet import first_line
from palate.types import Tokens

# What the environment has to say while the engine is made. In one process: its weights are to be reached by assignment.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Kept when somebody set them: threads stay where the trainer has them; what goes wrong is raised, not logged; nothing is
# reported to anybody.
_PREFERRED = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_NO_USAGE_STATS": "1"}
# Mean difference, nats a token, from the trainer's log-probs that rounding explains; other weights are far beyond it.
_ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.3, torch.float16: 0.1}
_CPU = torch.device("cpu")  # where vLLM's answers are
_BLOCK = 128  # tokens; the cache's blocks are this large on a CPU, smaller elsewhere


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
        self.kind = _kind(model)
        with _as_before(), tempfile.TemporaryDirectory() as folder:
            from vllm import LLM
            from vllm.platforms import current_platform

            device = _device(model)
            if current_platform.device_type != device.type or device.index:
                raise ConfigError(
                    f'engine: "vllm" is built for {current_platform.device_type}:0 here, and the policy is on {device}. '
                    f"Set device={current_platform.device_type}, or engine=embedded."
                )
            _write_config(model, folder)
            with _vllm_errors("cannot serve this model"):
                self.llm = LLM(
                    folder,
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    load_format="dummy",  # the weights come by take_weights
                    dtype=str(self.kind[1]).removeprefix("torch."),
                    max_model_len=max_length,
                    max_num_seqs=rows,
                    kv_cache_memory_bytes=_cache_bytes(model, max_length, rows, self.kind[1]),
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
        if _kind(model) != self.kind:
            raise ModelError(f"the engine was made for {_named(self.kind)} and is given {_named(_kind(model))}.")
        with torch.no_grad(), _vllm_errors("cannot take the weights"):
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
        with torch.no_grad(), _random_numbers_kept(), _vllm_errors("cannot sample"):
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


# --- the model -------------------------------------------------------------------------------------------------------


def served_weights(model: nn.Module, parts: set[str]) -> Mapping[str, Tensor]:
    """All weights under the names that the model's folder would have, an adapter added in; views where nothing changes.

    Args:
        parts: of vLLM's model. A head that is the embedding stands in no folder, but where vLLM has such a part it must be
            given: on a CPU it keeps the head's weights once more, packed.
    Raises:
        ModelError: the model has an adapter that is not a LoRA.
    """
    from transformers.core_model_loading import revert_weight_conversion

    inner = base_of(model)
    weights = merged_weights(model) if is_adapted(model) else model.state_dict()
    copies = getattr(inner, "all_tied_weights_keys", {})
    weights = {name: w for name, w in weights.items() if name not in copies or name.partition(".")[0] in parts}
    # transformers keeps some models (mixtures of experts) in other tensors than their files have.
    return revert_weight_conversion(inner, weights)


def _kind(model: nn.Module) -> tuple[str, torch.dtype]:
    """Architecture and dtype to compute in."""
    inner = base_of(model)
    dtype = getattr(inner, "compute_dtype", None) or inner.get_input_embeddings().weight.dtype
    return type(inner).__name__, dtype


def _named(kind: tuple[str, torch.dtype]) -> str:
    return f"{kind[0]} in {str(kind[1]).removeprefix('torch.')}"


def _write_config(model: nn.Module, folder: str) -> None:
    """The model's shape, where vLLM reads it; a few kilobytes, no weights."""
    config = copy.deepcopy(base_of(model).config)
    config.architectures = [type(base_of(model)).__name__]
    config.eos_token_id = None  # min_tokens would hold it back, whatever ends a response here
    config.save_pretrained(folder)


def _cache_bytes(model: nn.Module, max_length: int, rows: int, dtype: torch.dtype) -> int:
    """Keys and values of ``rows`` rows of ``max_length`` tokens, in whole blocks, and a row's more for vLLM's own use."""
    config = base_of(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    columns = -(-max_length // _BLOCK) * _BLOCK
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize * columns * (rows + 1)


@torch.no_grad()
def _check_first_look(model: nn.Module, tokens: Tokens, settings: SamplingSettings, rows: int = 4) -> None:
    """The first samples are those of the model that was given, to the trainer's own eye.

    Raises:
        ModelError: vLLM runs another function: weights that it did not take, or another reading of the architecture.
    """
    some = tokens.select(torch.arange(min(rows, len(tokens)), device=tokens.ids.device))
    with _eval_mode(model):
        expected = token_logprobs(model, some, temperature=settings.temperature or 1.0)
    mask, dtype = some.response_mask, _kind(model)[1]
    found: Any = some.extras["sampler_logprobs"]
    apart = float((found - expected)[mask].abs().mean())
    if not apart <= _ROUNDING[dtype]:  # NaN is not within it
        raise ModelError(
            f"vLLM's log-probabilities of its first samples are {apart:.3g} nats a token from the trainer's, expected at most "
            f"{_ROUNDING[dtype]:g} in {str(dtype).removeprefix('torch.')}: it runs {_kind(model)[0]} in another way, or did "
            "not take all of its weights. Set engine=embedded."
        )


# --- vLLM in another's process ---------------------------------------------------------------------------------------


@contextmanager
def _as_before() -> Iterator[None]:
    """What vLLM changes of the process while it starts is put back: threads, random numbers, the environment."""
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    os.environ |= _PREFERRED | environment | _ENVIRONMENT
    try:
        with _random_numbers_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, to vLLM
            yield
    finally:
        torch.set_num_threads = set_num_threads  # a CPU's worker puts a function there that does nothing
        torch.set_num_threads(threads)
        kept = {key: value for key, value in os.environ.items() if key.startswith("VLLM_")}  # read again later
        os.environ.clear()
        os.environ |= environment | kept


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """vLLM seeds every global generator when it starts, and draws from torch's beside the generators of its requests."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def _vllm_errors(what: str) -> Iterator[None]:
    """vLLM's own findings, as a person can use them."""
    try:
        yield
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if isinstance(error, (ConfigError, ModelError)):
            raise
        raise ModelError(f'engine: "vllm" {what}: {first_line(error)} Set engine=embedded.') from error
