"""The doctor: says by name what is wrong with somebody's attention. Built in chapter 4 of the book."""

from __future__ import annotations

import copy
import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mha_lib._checks import check_diagnosis, check_norm
from mha_lib.hints import HINTS, lines_to_look_at
from mha_lib.mistakes import Explanation, Mistake, Probe, Recipe, explain, recipe_error
from mha_lib.patient import CallError, Patient, said, unchanged_randomness, unregistered
from mha_lib.recognise import Projections, find_projections, given_projections, is_bias

TOKENS = (7, 5, 4, 6, 8, 16, 32, 64)
"""Lengths that are tried until the candidate takes one; an odd one first, that is not its number of heads."""

MOVED = {torch.float64: 1e-6, torch.float32: 1e-4}
"""By how many standard deviations an output must move to count as moved; 0.01 in 16 bits."""

EQUAL = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Up to how many standard deviations a right output may differ from the reference; 0.05 in 16 bits."""

CERTAIN = {torch.float64: 3e-6, torch.float32: 3e-5}
"""The same for an output with a mistake, which is named only if there is no doubt."""

HABITS = {"qkv_order_swapped", "kv_heads_tiled"}
"""What is a mistake in code that loads the weights of others, and a habit where a library does so throughout."""

FOLLOWS = {
    *("samples_mixed", "tokens_scrambled", "sees_future", "ignores_past", "ignores_future"),
    *("causal_off_by_one", "mask_inverted", "window_off_by_one", "window_ignored"),
}
"""Symptoms of ordinary outputs: a cause that explains every output explains these."""

NO_KEY = "the mask hides no key"
"""What two mistakes have in common that cannot be told apart from the outputs of real tokens."""

LONGEST_WINDOW = 32
"""Wider windows are not examined: the probe would have to be longer than the window."""


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        name: What it is called, such as ``"sees_future"``.
        evidence: What was measured.
        hint: Which line to look at and how to mend it.
        lines: Lines of the candidate's source that the hint may mean.
    """

    name: str
    evidence: str
    hint: str
    lines: tuple[str, ...] = ()


class Check(NamedTuple):
    """One check: its name, ``"passed"``, ``"failed"`` or ``"skipped"``, and what was measured or why it was not."""

    name: str
    result: str
    detail: str


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What the doctor found.

    Differences are measured in deviations: standard deviations of the candidate's output.

    Attributes:
        findings: What is wrong, causes before symptoms.
        verified: Whether the candidate equals the reference with its own weights.
        notes: What could not be explained or checked.
        checks: All checks that ran or were skipped.
    """

    findings: tuple[Finding, ...]
    verified: bool
    notes: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __repr__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [self._headline(), ""]
        for finding in self.findings:
            lines += [
                f"{finding.name}",
                f"    seen: {finding.evidence}",
                f"    mend: {finding.hint}",
            ]
            lines += [f"    line: {line}" for line in finding.lines]
        lines += [f"note: {note}" for note in self.notes]
        lines += [""] if self.findings or self.notes else []
        lines += [f"{c.name:<{width}}  {c.result:<7}  {c.detail}" for c in self.checks]
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.findings:
            return f"{len(self.findings)} finding{'s' * (len(self.findings) > 1)}"
        return (
            f"healthy, {'and' if self.verified else 'but not shown to be'} equal to the reference"
        )

    def _repr_html_(self) -> str:
        rows = [(f.name, f.evidence, f.hint, "\n".join(f.lines)) for f in self.findings]
        found = _html_table(("finding", "seen", "mend", "line"), rows) if rows else ""
        notes = "".join(f"<p>Note: {html.escape(note)}</p>" for note in self.notes)
        checks = _html_table(("check", "result", "detail"), self.checks)
        title = f"<p><strong>{html.escape(self._headline())}</strong></p>"
        return f"{title}{found}{notes}<details><summary>Checks</summary>{checks}</details>"


def _html_table(head: tuple[str, ...], rows: Any) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table>"


def diagnose(
    candidate: Callable[..., Any],
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    causal: bool = False,
    weights: str | Mapping[str, Any] | None = "auto",
    takes_mask: bool = False,
    rotary: Callable[[Tensor], Tensor] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    qk_norm: Callable[[int], nn.Module] | None = None,
) -> Diagnosis:
    """Examine somebody's multi-head self-attention and say what is wrong with it, by name.

    Two kinds of evidence are used. Properties need no weights: change a token, a sample, the padding or the order, and
    see what moves. Hypotheses need the weights: the reference is run with each known mistake built in, alone and in
    pairs, and a mistake whose output equals the candidate's is named.

    The candidate is copied, and the copy is examined: parameters, mode, hooks and gradients of the original, and the
    global random states, stay as they were.

    Args:
        candidate: A module or any function that maps tokens of shape ``(b, n, e)`` to the same shape; of a tuple the
            first element is taken. With ``takes_mask`` it is called as ``candidate(x, mask)``. Modules that take
            query, key and value, such as ``nn.MultiheadAttention``, are called with the same tokens for each.
        embed_dim: Width of the tokens, ``e``.
        num_heads: Number of heads, ``h``.
        num_kv_heads: Number of key/value heads, ``k``; as many as ``num_heads`` if None.
        causal: Whether a token is meant to see only itself and what is before it.
        weights: ``"auto"`` to look for the projections in the candidate; or a dict of matrices as ``nn.Linear`` has
            them, under names such as ``q``, ``k``, ``v``, ``out``, ``q_bias``; or None for the properties alone.
        takes_mask: Whether the candidate takes a padding mask of shape ``(b, n)``, True for real tokens.
        rotary: The positions it is meant to have, called as :class:`mha_lib.RotaryEmbedding` with queries and keys of
            shape ``(b, h, n, d)``.
        window: The width of the sliding window it is meant to have, as in :func:`mha_lib.sliding_window_mask`.
        scale: The factor of the scores, if it is meant to be another than ``head_dim ** -0.5``.
        softcap: The softcap it is meant to have.
        qk_norm: A factory of its norms of queries and keys, called with ``head_dim``; norms that are found in the
            candidate are used as they are.

    Returns:
        A :class:`mha_lib.doctor.Diagnosis`; ``.healthy`` is True if nothing was found.

    Raises:
        TypeError: An argument has the wrong type, or the candidate cannot be called.
        ValueError: A size is out of range, or ``weights`` hold no projections that fit.

    Example:
        >>> import torch
        >>> from mha_lib import SimpleMultiHeadAttention, diagnose
        >>> diagnose(SimpleMultiHeadAttention(12, 3, causal=True), 12, 3, causal=True).healthy
        True
        >>> [f.name for f in diagnose(SimpleMultiHeadAttention(12, 3), 12, 3, causal=True).findings]
        ['sees_future']
    """
    options = check_diagnosis(
        candidate,
        embed_dim,
        num_heads,
        num_kv_heads=num_kv_heads,
        causal=causal,
        weights=weights,
        takes_mask=takes_mask,
        rotary=rotary,
        window=window,
        scale=scale,
        softcap=softcap,
        qk_norm=qk_norm,
    )
    exam = Examination(candidate, **options)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_one_thread())
        exam.run()
    return exam.diagnosis()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products are faster on one thread, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Examination:
    """One examination: calls the candidate, notes what moves, and compares with the reference."""

    def __init__(
        self,
        candidate: Callable[..., Any],
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None,
        causal: bool,
        weights: str | Mapping[str, Any] | None,
        takes_mask: bool,
        rotary: Callable[[Tensor], Tensor] | None,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        qk_norm: Callable[[int], nn.Module] | None,
    ) -> None:
        self.candidate, self.embed_dim, self.num_heads = candidate, embed_dim, num_heads
        self.num_kv_heads, self.causal, self.takes_mask = num_kv_heads, causal, takes_mask
        self.window, self.qk_norm = window, qk_norm
        self.rotary = copy.deepcopy(rotary) if isinstance(rotary, nn.Module) else rotary
        self.scale, self.softcap = scale, softcap
        self.patient: Patient
        self.x: Tensor
        self.base: Tensor
        self.reaches: Tensor
        self.given = weights
        if isinstance(weights, Mapping):
            try:
                found = given_projections(weights, embed_dim, num_heads, num_kv_heads)
            except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
                raise ValueError(f"weights must be a dict of matrices: {said(error)}") from error
            if isinstance(found, str):
                raise ValueError(f"weights must hold the projections of one attention: {found}")
            self.given = None
            self.weights: Projections | None = found
        else:
            self.weights = None
        self.causes: dict[str, list[str]] = {}
        self.symptoms: dict[str, list[str]] = {}
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.verified = False
        self.inverted = False
        self.default_device = torch.get_default_device()
        self.ended = False
        self.stateful = False
        self.explained: list[str] = []

    def diagnosis(self) -> Diagnosis:
        """The result, causes before symptoms."""
        names = [*self.causes, *(name for name in self.symptoms if name not in self.causes)]
        findings = tuple(self._finding(name) for name in names)
        verified = self.verified and not findings
        return Diagnosis(findings, verified, tuple(self.notes), tuple(self.checks))

    def _finding(self, name: str) -> Finding:
        """A finding with its advice; of a symptom that a cause explains, which cause, since that gives every output."""
        evidence = "; ".join([*self.causes.get(name, []), *self.symptoms.get(name, [])])
        if name in FOLLOWS and self.explained and name not in self.causes:
            hint = f"Follows from {' and '.join(self.explained)}; mend that."
            return Finding(name, evidence, hint)
        return Finding(
            name, evidence, HINTS[name], lines_to_look_at(self.candidate, name, evidence)
        )

    def run(self) -> None:
        """All checks, in the order in which they build on each other."""
        steps = [
            self._admit,
            self._find_weights,
            self._check_registration,
            self._check_random,
            *([self._check_padding, self._check_empty_rows] if self.takes_mask else []),
            self._check_samples,
            self._check_influence,
            self._check_constant_tokens,
            self._check_permutation,
            self._check_gradients,
            self._check_mistakes,
            self._check_large,
            self._check_half,
        ]
        for step in steps:
            try:
                step()
            except CallError as error:
                self._record("call again", f"after a first call it failed: {error}", "raises")
                return
            if self.ended:
                return

    def _record(self, check: str, detail: str, *found: str) -> None:
        """Note a check; ``found`` are the names of symptoms, for which the detail is the evidence."""
        self.checks.append(Check(check, "failed" if found else "passed", detail))
        for name in found:
            self.symptoms.setdefault(name, []).append(detail)

    def _fail(self, check: str, detail: str, *found: str) -> None:
        """Note that a check that was recorded has failed."""
        self.checks = [c._replace(result="failed") if c.name == check else c for c in self.checks]
        for name in found:
            self.symptoms.setdefault(name, []).append(detail)

    def _skip(self, check: str, why: str) -> None:
        self.checks.append(Check(check, "skipped", why))

    def _ask(self, x: Tensor, real: Tensor | None = None, **options: Any) -> Tensor:
        """What the candidate answers, in float64; everything is real unless the padding mask says otherwise."""
        if self.stateful:
            self.patient = self._copy(self.patient.dtype)
        answer = self._answer(self.patient, x, real, **options)
        if not isinstance(answer, Tensor) or answer.shape != x.shape:
            got = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise CallError(f"tokens of shape {tuple(x.shape)} gave {got}")
        return answer.double()

    def _answer(self, patient: Patient, x: Tensor, real: Tensor | None, **options: Any) -> Any:
        if not self.takes_mask:
            return patient(x, **options)
        real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        return patient(x, ~real if self.inverted else real, **options)

    def _copy(self, dtype: torch.dtype | None = None, *, refill: bool = True) -> Patient:
        return Patient(
            self.candidate,
            causal=self.causal,
            dtype=dtype,
            default_device=self.default_device,
            refill=refill,
        )

    def _tokens(self, batch: int, tokens: int, seed: int = 0) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = (batch, tokens, self.embed_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def _tokens_like(self, x: Tensor, seed: int) -> Tensor:
        return self._tokens(x.shape[0], x.shape[1], seed)

    def _moved(self, before: Tensor, after: Tensor) -> Tensor:
        """How far each output moved, in standard deviations, ``(b, n)``; 0 where it is not a number."""
        change = (after - before).abs().amax(dim=-1)
        finite = before[before.isfinite()]
        return (change / finite.std().clamp_min(1e-30)).nan_to_num(0.0, 0.0, 0.0)

    # Admission: can it be called at all, and in which precision is it examined?

    def _admit(self) -> None:
        self.ended = True
        try:
            native = self._copy()
        except Exception as error:  # a stranger's objects may raise anything when they are copied
            self._record("copy", f"it cannot be copied: {said(error)}", "cannot_be_copied")
            return
        taken, answer = self._first_answer(native)
        if not taken or not self._has_right_form(native, answer):
            return
        self.patient = native if native.dtype == torch.float64 else self._precise(native, answer)
        self.base = self._ask(self.x)
        if self.patient.dropped:
            self.notes.append(f"Examined without its hooks: {', '.join(self.patient.dropped)}.")
        if self.patient.refilled and self.given == "auto":
            names = ", ".join(self.patient.refilled)
            self.notes.append(f"All zero, and examined with small random numbers: {names}.")
        if (
            isinstance(self.patient.call, nn.MultiheadAttention)
            and not self.patient.call.batch_first
        ):
            self.notes.append("batch_first=False: it was called with tokens of shape (n, b, e).")
        if native.overwrites:
            detail = "the tokens that it was given are changed afterwards"
            self._record("input kept", detail, "input_overwritten")
        self.ended = not self._is_finite()

    def _first_answer(self, patient: Patient) -> tuple[bool, Any]:
        """Call it with tokens of a few lengths until one is taken."""
        lengths = [self.window + 3] if self.window and self.window <= LONGEST_WINDOW else []
        dim = self.embed_dim // self.num_heads
        lengths += [n for n in TOKENS if n not in (self.num_heads, self.num_kv_heads, dim)]
        lengths += [n for n in _sizes_in(patient) if n not in (*lengths, self.embed_dim)]
        batch = 3 if self.num_heads != 3 else 2
        errors = []
        for size, tokens in [*((batch, n) for n in lengths), (1, lengths[0])]:
            self.x = self._tokens(size, tokens)
            try:
                answer = self._answer(patient, self.x, None)
            except CallError as error:
                errors.append(f"{tuple(self.x.shape)}: {error}")
                continue
            if errors and size == 1:
                detail = f"it takes one sample alone, not a batch of shape {errors[0]}"
                self._record("call", detail, "raises")
                return False, None
            if errors:
                self.notes.append(f"It does not take every length: {errors[0]}")
            self._record("call", f"takes tokens of shape {tuple(self.x.shape)}")
            return True, answer
        self._record("call", f"it raised on tokens of shape {errors[0]}", "raises")
        return False, None

    def _has_right_form(self, patient: Patient, answer: Any) -> bool:
        odd = isinstance(answer, Tensor) and (
            answer.is_meta or answer.is_nested or answer.layout != torch.strided
        )
        if odd or not isinstance(answer, Tensor):
            detail = (
                f"it returned {type(answer).__module__}.{type(answer).__name__}, not a dense tensor"
            )
            self._record("output", detail, "output_type")
            return False
        if answer.shape != self.x.shape:
            expected, got = tuple(self.x.shape), tuple(answer.shape)
            self._record("output", f"tokens of shape {expected} gave {got}", "output_shape")
            return False
        if answer.dtype != patient.dtype:
            detail = f"tokens of dtype {patient.dtype} gave {answer.dtype}"
            self._record("output", detail, "output_type")
            return answer.dtype in (torch.float16, torch.bfloat16, *MOVED)
        self._record("output", f"the same shape and dtype, {answer.dtype}")
        return True

    def _precise(self, native: Patient, answer: Tensor) -> Patient:
        """The candidate in float64 or, where it cannot be converted, in float32 or as it is."""
        for dtype in (torch.float64, torch.float32):
            try:
                patient = self._copy(dtype)
                converted = self._answer(patient, self.x, None)
            except Exception:  # as above; then it is examined in another precision
                continue
            if isinstance(converted, Tensor) and converted.shape == answer.shape:
                return patient
        return native

    def _is_finite(self) -> bool:
        if self.takes_mask and not self.base.isfinite().all():
            nothing = torch.zeros(self.x.shape[:2], dtype=torch.bool)
            turned = self._ask(self.x, nothing)
            if turned.isfinite().all():
                detail = "not finite when all tokens are real, finite when none is"
                self._record("mask sense", detail, "mask_inverted")
                self.inverted, self.base = True, turned
        finite = self.base.isfinite().all(dim=-1)
        if finite.all():
            self._record("finite", "all outputs on normal tokens are finite")
            return True
        broken = int((~finite).sum())
        detail = f"{broken} of {finite.numel()} outputs on normal tokens are not finite"
        self._record("finite", detail, "not_finite")
        return bool(finite.any())

    # Properties: what moves when something is changed?

    @property
    def _tolerance(self) -> float:
        return MOVED.get(self.patient.dtype, 1e-2)

    def _check_registration(self) -> None:
        lost = [name for module in self.patient.modules() for name in unregistered(module)]
        if lost:
            detail = f"{', '.join(lost)} do not appear in parameters()"
            self._record("registered", detail, "parameters_not_registered")

    def _check_random(self) -> None:
        first, new = self._ask(self.x, dropout=True), self._tokens_like(self.x, seed=8)
        self._ask(new, dropout=True)
        again = self._ask(self.x, dropout=True)
        other = self._ask(self.x, seed=1, dropout=True)
        same, random = self._moved(first, again).max(), self._moved(first, other).max()
        if same > self._tolerance:
            detail = f"the same tokens and seed gave outputs that differ by {same:.2g} deviations"
            self._record("repeatable", detail, "output_changes_between_calls")
            self.stateful = True
            self.base = self._ask(self.x)
        elif random > self._tolerance:
            detail = f"in eval mode, two seeds gave outputs that differ by {random:.2g} deviations"
            still = self._moved(self._ask(self.x, seed=0), self._ask(self.x, seed=1)).max()
            found = ["dropout_in_eval"]
            if still > self._tolerance:
                found += ["output_changes_between_calls"]
                detail += ", with torch's dropout switched off too"
            self._record("repeatable", detail, *found)
        else:
            self._record("repeatable", "two calls in eval mode give the same")
            self._check_memory(new)

    def _check_memory(self, new: Tensor) -> None:
        """Whether a copy that was called before answers as a fresh one does, to new tokens and to fewer."""
        for x in (new, new[:, :-2]):
            fresh = self._copy(self.patient.dtype)
            try:
                expected = self._answer(fresh, x, None)
            except CallError as error:
                self.notes.append(f"It does not take every length: {tuple(x.shape)}: {error}")
                return
            try:
                moved = self._moved(expected, self._ask(x)).max()
                detail = f"after other calls the output differs by {moved:.2g} deviations"
                changed = bool(moved > self._tolerance)
            except CallError as error:
                changed, detail = True, f"after a call with another length it failed: {error}"
            if changed:
                self._record("memory", detail, "output_changes_between_calls")
                self.stateful = True
                self.base = self._ask(self.x)
                return

    def _check_samples(self) -> None:
        if len(self.x) == 1:
            return self._skip("samples", "it takes one sample only")
        moved = torch.zeros(())
        for kept in (0, -1):
            changed = self._tokens_like(self.x, seed=1)
            changed[kept] = self.x[kept]
            each = self._moved(self.base, self._ask(changed))[kept].max().cpu()
            moved = torch.maximum(moved, each)
        detail = f"other samples changed: the output of one moved by {moved:.2g} deviations"
        self._record("samples", detail, *["samples_mixed"] * bool(moved > self._tolerance))
        return None

    def _check_influence(self) -> None:
        moved = self._influence(self.x)
        rows = self.base.isfinite().all(dim=-1).all(dim=0).cpu()
        size = len(moved)
        distance = torch.arange(size)[:, None] - torch.arange(size)
        wanted = distance >= 0 if self.causal else torch.ones(size, size, dtype=torch.bool)
        window = self.window if self.window and self.window + 3 <= size else None
        if self.window and not window:
            self.notes.append(f"window={self.window} is longer than the probe and was not checked.")
        if window:
            wanted = wanted & (distance.abs() < window)
        self.reaches = moved > self._tolerance
        for calm in (self.x * 0.1, self.x * 0.01, self._nearly_equal()):
            if not self.reaches[rows][wanted[rows]].all():
                moved = torch.maximum(moved, self._influence(calm))
                self.reaches = moved > self._tolerance
        self.reaches &= rows[:, None]
        self._judge_influence(moved, distance, wanted, rows[:, None], window)

    def _nearly_equal(self) -> Tensor:
        """Tokens that differ little: their scores do too, so that no weight vanishes, behind a norm either."""
        return self.x[:, :1] + 1e-3 * self.x

    def _influence(self, x: Tensor) -> Tensor:
        """How far output i moves when token j changes, ``(i, j)``, the largest over all samples."""
        before, columns = self._ask(x), []
        mean = x.mean(dim=1, keepdim=True)
        fresh = mean + self._tokens_like(x, seed=2) * (x - mean).std()
        for token in range(x.shape[1]):
            changed = x.clone()
            changed[:, token] = fresh[:, token]
            columns.append(self._moved(before, self._ask(changed)).amax(dim=0).cpu())
        return torch.stack(columns, dim=1)

    def _judge_influence(
        self, moved: Tensor, distance: Tensor, wanted: Tensor, rows: Tensor, window: int | None
    ) -> None:
        reach, found = self.reaches, list[str]()
        past, future = (distance > 0) & rows, (distance < 0) & rows
        self._record("influence", _told(moved, wanted, reach, rows))
        if self.causal and (reach & future).any():
            found += ["sees_future"]
            if not (reach & future & (distance < -1)).any():
                found += ["causal_off_by_one"]
            if not (reach & past).any():
                found += ["mask_inverted"]
        elif self.causal and not reach.diagonal()[1:].any() and (reach & past).any():
            found += ["causal_off_by_one"]
        if window and (reach & ~wanted & past).any():
            width = int(distance[reach].max()) + 1
            found += ["window_off_by_one" if width == window + 1 else "window_ignored"]
        elif window and not reach[distance == window - 1].any():
            found += ["window_off_by_one"]
        if found:
            self._fail("influence", _told(moved, wanted, reach, rows), *found)
        for name, region in (("ignores_past", past), ("ignores_future", future)):
            deaf = wanted & region & ~reach
            if deaf.any() and "window_off_by_one" not in found:
                self._fail("influence", _told(moved, deaf, reach & False, deaf), name)

    def _check_constant_tokens(self) -> None:
        """Equal tokens must give equal outputs, whatever the positions do to the scores."""
        size = 1000.0 if self.patient.dtype in MOVED else 8.0
        x = self._tokens(8, 1, seed=3).expand(8, self.x.shape[1], -1) * size
        rows = self.reaches.any(dim=1)
        output = self._ask(x)[:, rows.to(self.base.device)]
        names = " ".join(
            name for module in self.patient.modules() for name, _ in module.named_parameters()
        )
        if "sink" in names:
            return self._skip("equal tokens", "sinks take a share that depends on the position")
        if rows.sum() < 3 or not output.isfinite().all():
            return self._skip("equal tokens", "the outputs are not finite, or too few to compare")
        spread = (output - output.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2))
        relative = float((spread / output.abs().amax(dim=(1, 2)).clamp_min(1e-30)).max())
        scrambled = relative > 0.05 and not _is_fading(output)
        detail = f"equal tokens gave outputs that differ by {relative:.2g} of their size"
        self._record("equal tokens", detail, *["tokens_scrambled"] * scrambled)
        return None

    def _check_permutation(self) -> None:
        if self.causal or self.window or self.rotary is not None:
            return self._skip("permutation", "the order of the tokens is meant to matter")
        order = torch.randperm(self.x.shape[1], generator=torch.Generator().manual_seed(4))
        expected, got = self.base[:, order], self._ask(self.x[:, order])
        moved = self._moved(expected, got).max()
        detail = f"shuffled tokens: outputs differ from shuffled outputs by {moved:.2g} deviations"
        if moved > self._tolerance and not self.symptoms:
            self.notes.append(
                "The output depends on the order of the tokens, and nothing is scrambled: positions "
                "by design? Pass rotary= to have rotary positions checked."
            )
            return self._skip("permutation", f"{detail}: positions by design?")
        self._record("permutation", detail)
        if moved > self._tolerance:
            self._fail("permutation", detail)
        return None

    def _check_padding(self) -> None:
        """Padding on the right, on the left and none: what padded tokens hold must not matter."""
        x = self._tokens(3, self.x.shape[1], seed=5)
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        real[0, :1], real[1, :2], real[2, -2:] = False, False, False
        before = self._ask(x, real)
        other = self._tokens_like(x, seed=6)
        hidden, shown, watched = torch.where(real[..., None], x, other), x.clone(), real.clone()
        for sample, token in ((0, 1), (1, 2), (2, 0)):
            shown[sample, token], watched[sample, token] = other[sample, token], False
        leaked = self._moved(before, self._ask(hidden, real)).cpu()
        heard = self._moved(before, self._ask(shown, real)).cpu()
        leak = leaked[real].max()
        detail = f"padded tokens changed: the outputs of real tokens moved by {leak:.2g} deviations"
        found = ["padding_leaks"] * bool(leak > self._tolerance)
        samples = (0, 1) if self.causal else (0, 1, 2)
        deaf = all((heard[s][watched[s]] <= self._tolerance).all() for s in samples)
        if deaf and all((leaked[s][watched[s]] > self._tolerance).any() for s in samples):
            found = ["mask_inverted"]
            detail += ", and changed real tokens moved nothing"
            self.inverted = not self.inverted
            self.base = self._ask(self.x)
        self._record("padding", detail, *found)

    def _check_empty_rows(self) -> None:
        real = torch.ones(self.x.shape[:2], dtype=torch.bool)
        real[-1] = False
        detail = "a sample without a real token gives finite outputs"
        try:
            broken = not self._ask(self.x, real)[-1].isfinite().all()
        except CallError as error:
            return self._skip("empty rows", f"it refuses a sample without a real token: {error}")
        if broken:
            detail = "a sample without a real token gives NaN"
        elif (gradients := self._gradients(real)) is not None:
            broken = any(not g.isfinite().all() for g in gradients.values() if g is not None)
            detail = f"{detail}, {'but gradients that are NaN' if broken else 'and gradients'}"
        if broken and self.patient.is_published():
            self.notes.append(f"{detail.capitalize()}; this is known of the library it is from.")
            return self._skip("empty rows", f"{detail}, as known of the library it is from")
        self._record("empty rows", detail, *["nan_when_all_masked"] * broken)
        return None

    def _gradients(
        self, real: Tensor | None = None, x: Tensor | None = None
    ) -> dict[str, Tensor | None] | None:
        """The gradient of each parameter; None if there are no parameters, or the backward pass fails."""
        x = self.x if x is None else x
        parameters = self.patient.parameters()
        if not parameters:
            return None
        with torch.enable_grad():
            output = self._answer(self.patient, x, real)
            weighed = output * self._tokens_like(x, seed=7).to(output)
            total = weighed.sum() if real is None else weighed[real.to(weighed.device)].sum()
            if not total.requires_grad:
                return dict.fromkeys(parameters)
            try:
                gradients = torch.autograd.grad(total, [*parameters.values()], allow_unused=True)
            except RuntimeError:
                return None
        return dict(zip(parameters, gradients, strict=True))

    def _check_gradients(self) -> None:
        gradients = self._gradients()
        if gradients is None:
            return self._skip("gradients", "no parameters were found")
        known = [g for g in gradients.values() if g is not None]
        if not known and not isinstance(self.candidate, nn.Module):
            return self._skip("gradients", "the function gives none: it may run under no_grad")
        lost = []
        for name, gradient in gradients.items():
            if not self._is_examined(name):
                continue
            if gradient is None:
                lost.append(name)
            elif gradient.ndim > 1 and not is_bias(name):
                dead = self._dead_everywhere(name, gradient)
                if any(dead):
                    part = "" if all(dead) else f" (third {dead.index(True) + 1} of its rows)"
                    lost.append(f"{name}{part}")
        detail = f"a gradient reaches all {len(gradients)} parameters"
        if lost:
            detail = f"no gradient reaches {', '.join(lost)}"
        self._record("gradients", detail, *["parameter_without_gradient"] * bool(lost))
        return None

    def _dead_everywhere(self, name: str, gradient: Tensor) -> list[bool]:
        """Whether a gradient is zero for tokens that differ little, too: there no weight vanishes."""
        dead = _dead(gradient)
        if not any(dead):
            return dead
        calm = (self._gradients(x=self._nearly_equal()) or {}).get(name)
        return [here and there for here, there in zip(dead, _dead(calm), strict=False)]

    def _is_examined(self, parameter: str) -> bool:
        """Whether a parameter belongs to the attention: all of a module's do, but not all that a function reaches."""
        if isinstance(self.candidate, nn.Module):
            return True
        places = self.weights.places.values() if self.weights is not None else ()
        return any(parameter.startswith(place) for place in places)

    def _check_large(self) -> None:
        try:
            patient = self._copy(torch.float32)
            self._answer(patient, self.x, None)
        except Exception:  # as above
            return self._skip("large tokens", "it cannot be converted to float32")
        output = self._answer(patient, self.x * 1000, None)
        rows = self.base.isfinite().all(dim=-1)
        broken = not output[rows].isfinite().all()
        detail = (
            f"tokens 1000 times as large give {'NaN or infinity' if broken else 'finite outputs'}"
        )
        self._record("large tokens", detail, *["softmax_overflows"] * broken)
        return None

    def _check_half(self) -> None:
        name = "half precision"
        real = None
        if self.takes_mask:
            real = torch.ones(self.x.shape[:2], dtype=torch.bool)
            real[0, -1] = False
        try:
            patient = self._copy(torch.float16)
            x = self.x * self._amplitude(25.0, spread=False)
            expected = self._ask(x, real)
            output = self._answer(patient, x, real).double()
        except Exception as error:  # also what a stranger's objects raise when they are copied
            if "overflow" not in str(error):
                return self._skip(name, f"it does not run in float16: {error}")
            self._record(name, f"it raised in float16: {error}", "overflow_in_half")
            return None
        fits = expected.abs() < 3e4
        broken = bool((fits & ~output.isfinite()).any())
        detail = f"in float16 the outputs are {'not all' if broken else 'all'} finite"
        self._record(name, detail, *["overflow_in_half"] * broken)
        return None

    # Hypotheses: which mistake, built into the reference, gives the same output?

    def _find_weights(self) -> None:
        if self.given == "auto":
            found = self._recognised()
            if isinstance(found, str):
                self.notes.append(f"Not compared with the reference: {found}.")
                return
            self.weights = found
            for one, other in (("query", "key"), ("query", "value"), ("key", "value")):
                places = found.places.get(one), found.places.get(other)
                modules = [self.patient.module_at(place) for place in places if place]
                if len(modules) == 2 and modules[0] is not None and modules[0] is modules[1]:
                    detail = f"{one} and {other} are the same projection, {found.places[one]}"
                    self.causes.setdefault("projection_reused", []).append(detail)
        if self.weights is not None:
            self.weights = self.weights.to(self.base.device)

    def _recognised(self) -> Projections | str:
        return find_projections(
            self.patient.owners, self.embed_dim, self.num_heads, self.num_kv_heads
        )

    def _check_mistakes(self) -> None:
        if self.weights is None:
            self._skip("reference", "the weights are not known")
        else:
            self._compare("reference")

    def _probe(self, x: Tensor, real: Tensor | None = None) -> Probe:
        assert self.weights is not None
        heads = self.num_heads
        return Probe(
            x=x.to(self.base.device),
            weights=self.weights,
            num_heads=heads,
            num_kv_heads=len(self.weights.key) * heads // len(self.weights.query),
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            rotary=self.rotary,
            norms=self._norms(),
            real=None if real is None else real.to(self.base.device),
        )

    def _norms(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
        """The candidate's own norms of queries and keys, or fresh ones."""
        own = self.patient.norms() if self.given == "auto" else None
        if own is None and self.qk_norm is not None and self.weights is not None:
            dim = len(self.weights.query) // self.num_heads
            with unchanged_randomness(self.base.device):
                query, key = (check_norm(self.qk_norm(dim)).to(self.base) for _ in range(2))
            return query, key
        return own

    def _amplitude(self, goal: float, *, spread: bool) -> float:
        """How large tokens must be for scores of a given size, so that mistakes show; 1 if it is not known."""
        if self.weights is None:
            return 4.0
        probe = self._probe(self.x[:2])
        if probe.norms is not None:
            return 1.0
        query, key = (probe.projected(role, Recipe()) for role in "qk")
        width = key.shape[-1]
        scale = probe.head_dim**-0.5 if self.scale is None else self.scale
        scores = (query[..., :width] @ key.mT) * scale
        if width > probe.head_dim:
            scores = scores * (probe.head_dim / width) ** 0.5
        size = float(scores.std() if spread else scores.abs().max())
        return float(min(max((goal / max(size, 1e-12)) ** 0.5, 1e-3), 1e3))

    def _compare(self, name: str) -> None:
        assert self.weights is not None
        tokens = min(self.x.shape[1], 5) if not self.window else self.x.shape[1]
        if tokens == self.num_heads and tokens < self.x.shape[1]:
            tokens += 1
        if self.patient.refilled and self.given == "auto" and self._is_right_as_it_is(name):
            return None
        x = self.x[: 1 if tokens > 16 else 2] * self._amplitude(1.5, spread=True)
        x = x.to(self.patient.dtype).double()
        try:
            seen, output = self._watched(x[:, :tokens])
            x = x[:, :tokens]
        except CallError:
            seen, output = self._watched(x)
        answers = [(self._probe(x), self._ask(x))]
        if seen is not None or output is not None:
            inside = x if seen is None else seen
            answers.append((self._probe(inside), answers[0][1] if output is None else output))
        found = self._explained(answers, self._conventions()) or self._fitted(answers)
        if found is None:
            least = self._distance(*answers[0])
            detail = f"differs from the reference by {least:.2g} deviations; no known mistake explains it"
            self.notes.append(f"The output {detail}.")
            if self.symptoms.keys() & FOLLOWS:
                self.notes.append(
                    "Up to two mistakes are tried together: mend what was found, and run again."
                )
            return self._skip(name, detail)
        probe, target = answers[found.answer]
        plain = found.answer == 0
        if not plain:
            self.notes.append(
                "Compared between the projections: the module does something to the tokens before "
                "them or to the outputs after them, such as a norm or a residual, that was not examined."
            )
            if not found.mistakes and self.symptoms.pop("tokens_scrambled", []):
                self.notes.append(
                    "Equal tokens gave unequal outputs: positions are added to the tokens?"
                )
        self._report(name, probe, target, found)
        self.verified = plain and not self.causes and not self.patient.dropped
        if self.takes_mask and plain:
            self._compare_padding(found.recipe)
        return None

    def _is_right_as_it_is(self, name: str) -> bool:
        """Whether the candidate equals the reference before its zero parameters got random numbers."""
        kept = self.patient, self.weights
        self.patient = self._copy(self.patient.dtype, refill=False)
        found = self._recognised()
        try:
            if isinstance(found, Projections) and not self.takes_mask:
                self.weights = found.to(self.base.device)
                x = self.x * self._amplitude(1.5, spread=True)
                probe, target = self._probe(x), self._ask(x)
                error = self._distance(probe, target)
                spread = float(target.std())
                self.verified = spread > 1e-6 and error < EQUAL.get(self.patient.dtype, 0.05)
        finally:
            self.patient, self.weights = kept
        if self.verified:
            self.checks.append(Check(name, "passed", f"largest difference {error:.1e} deviations"))
        return self.verified

    def _watched(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What goes into the query projection and what comes out of the output projection, where that differs."""
        assert self.weights is not None
        places = self.weights.places
        first = self.patient.module_at(places.get("query", places.get("packed", "")))
        last = self.patient.module_at(places.get("out", ""))
        seen: dict[str, Any] = {}
        hooks: list[Any] = []
        if first is not None and not isinstance(first, torch.jit.ScriptModule):
            hooks.append(
                first.register_forward_pre_hook(
                    lambda _, got: seen.update(x=got[0] if got else None)
                )
            )
        if last is not None and not isinstance(last, torch.jit.ScriptModule):
            hooks.append(last.register_forward_hook(lambda _, __, got: seen.update(y=got)))
        output = self._ask(x)
        for hook in hooks:
            hook.remove()
        results = []
        for key, known in (("x", x.to(self.base.device)), ("y", output)):
            value = seen.get(key)
            value = value.double() if isinstance(value, Tensor) else known
            fits = value.shape == known.shape
            same = fits and torch.allclose(value, known, rtol=1e-5, atol=1e-7)
            results.append(value if fits and not same else None)
        return results[0], results[1]

    def _conventions(self) -> list[Recipe]:
        """The ways to read the weights that are all right."""
        assert self.weights is not None
        layouts = ["three h d"]
        if self.weights.packed == "kv":
            layouts += ["k two d"]
        elif self.weights.packed:
            equal = len(self.weights.query) == len(self.weights.key)
            layouts += ["h three d", "h d three"] if equal else ["k (g two) d"]
        turns = ["", "qkvo", "qkv", "o"] if self.weights.raw else [""]
        norms = ["head", "flat"] if self._norms() else ["head"]
        return [
            Recipe(layout=layout, transposed=turn, norm=norm)
            for layout in layouts
            for turn in turns
            for norm in norms
        ]

    def _distance(self, probe: Probe, target: Tensor) -> float:
        """How far the reference without a mistake is from ``target``, in the best of the conventions."""
        return min(recipe_error(recipe, probe, target) for recipe in self._conventions())

    def _explained(
        self,
        answers: list[tuple[Probe, Tensor]],
        conventions: list[Recipe],
        mistakes: list[Mistake] | None = None,
    ) -> Explanation | None:
        dtype = self.patient.dtype
        return explain(
            answers,
            conventions,
            tolerance=EQUAL.get(dtype, 0.05),
            certain=CERTAIN.get(dtype, 0.05),
            mistakes=mistakes,
        )

    def _fitted(self, answers: list[tuple[Probe, Tensor]]) -> Explanation | None:
        """The reference with another factor of the scores, if one fits."""
        if self.stateful:
            return None
        for number, (probe, target) in enumerate(answers):
            right = probe.head_dim**-0.5 if probe.scale is None else probe.scale or 1.0
            for convention in self._conventions():
                factor, error = _best_scale(convention, probe, target, right)
                if error < CERTAIN.get(self.patient.dtype, 0.05):
                    does = f"scores are multiplied by {factor:.4g}, not by {right:.4g}"
                    mistake = Mistake("scale_wrong", {"scale": factor}, does)
                    recipe = replace(convention, scale=factor)
                    return Explanation(recipe, (mistake,), error, number)
        return None

    def _report(self, name: str, probe: Probe, target: Tensor, found: Explanation) -> None:
        assert self.weights is not None
        whole = f"largest difference {found.error:.1e} deviations"
        right = self._distance(probe, target)
        for mistake in found.mistakes:
            if mistake.name in HABITS and self.patient.is_published():
                self.notes.append(f"In this library {mistake.does}.")
                continue
            evidence = f"equals the reference if {mistake.does} ({whole}; without it {right:.2g})"
            others = " and ".join(m.does for m in found.mistakes if m is not mistake)
            if others:
                evidence = f"equals the reference if {mistake.does} ({whole}, given that {others})"
            self.causes.setdefault(mistake.name, []).append(evidence)
            self.explained.append(mistake.name)
        if self.weights.sliced:
            detail = "each projection reads the slice of one head, and so the output is explained"
            self.causes.setdefault("input_sliced_per_head", []).append(f"{detail} ({whole})")
        if self.weights.out is None and self.given == "auto":
            self._judge_missing_output()
        if self.causes:
            names = ", ".join(self.causes)
            self.checks.append(Check(name, "failed", f"equals the reference with {names} built in"))
        else:
            layout = f", packed rows ordered ({found.recipe.layout})" * bool(self.weights.packed)
            self.checks.append(Check(name, "passed", f"{whole}{layout}"))

    def _judge_missing_output(self) -> None:
        detail = "no output projection was found, and without one the output is explained"
        if self.patient.is_published():
            self.notes.append("The output projection is not part of this module of its library.")
        else:
            self.causes.setdefault("output_projection_missing", []).append(detail)

    def _compare_padding(self, recipe: Recipe) -> None:
        """The same comparison with padded tokens, which must be hidden from all queries."""
        x = self.x[:2] * self._amplitude(1.5, spread=True)
        real = torch.ones(x.shape[:2], dtype=torch.bool)
        real[0, -2:], real[1, :1] = False, False
        target, probe = self._ask(x, real), self._probe(x, real)
        causal = recipe.forbid[0]
        mistakes = [
            Mistake(
                "padding_leaks", {"padding": "ignored"}, f"{NO_KEY}: not used, or on the queries"
            ),
            Mistake("padding_leaks", {"padding": "queries"}, f"{NO_KEY}, but queries"),
            Mistake("mask_inverted", {"padding": "inverted"}, "real tokens are hidden, not padded"),
            Mistake(
                "mask_times_zero",
                {"forbid": (causal, "zero")},
                "padded scores become 0 before the softmax, not minus infinity",
            ),
            Mistake(
                "mask_after_softmax",
                {"forbid": (causal, "after")},
                "weights of padded tokens are set to 0 after the softmax",
            ),
        ]
        found = self._explained([(probe, target)], [recipe], mistakes)
        if found is None:
            self.verified = False
            error = recipe_error(recipe, probe, target)
            detail = f"with padding it differs from the reference by {error:.2g} deviations"
            self.notes.append(f"{detail.capitalize()}; no known mistake explains it.")
            return self._skip("reference, padded", detail)
        for mistake in found.mistakes:
            evidence = f"equals the reference if {mistake.does}"
            self.causes.setdefault(mistake.name, []).append(evidence)
        detail = f"largest difference {found.error:.1e} deviations"
        if found.mistakes:
            detail = f"equals the reference with {found.mistakes[0].name} built in"
        result = "failed" if found.mistakes else "passed"
        self.checks.append(Check("reference, padded", result, detail))
        return None


def _best_scale(
    convention: Recipe, probe: Probe, target: Tensor, right: float
) -> tuple[float, float]:
    """The factor of the scores that comes closest, from a 256th to 256 times the right one, and its error."""

    def error(power: float) -> float:
        return recipe_error(replace(convention, scale=right * 2.0**power), probe, target)

    best, step = min((k / 4 for k in range(-32, 33)), key=error), 0.25
    while step > 1e-7 and error(best) < 1.0:
        step /= 2
        best = min((best - step, best, best + step), key=error)
    return right * 2.0**best, error(best)


def _dead(gradient: Tensor | None) -> list[bool]:
    """Whether a gradient is zero, for each third of the rows of a packed matrix."""
    if gradient is None:
        return [True]
    rows, columns = gradient.flatten(1).shape
    parts = gradient.chunk(3) if rows == 3 * columns else [gradient]
    return [not bool(part.any()) for part in parts]


def _told(moved: Tensor, wanted: Tensor, reach: Tensor, rows: Tensor) -> str:
    """The most telling pair of tokens, in words."""
    wrong, deaf = reach & ~wanted, wanted & ~reach & rows
    if wrong.any():
        i, j = divmod(int((moved * wrong).argmax()), len(moved))
        return f"token {j} changed: the output of token {i} moved by {moved[i, j]:.2g} deviations"
    if deaf.any():
        i, j = (int(place) for place in deaf.nonzero()[0])
        return f"token {j} changed: the output of token {i} did not move"
    return "each token moves the outputs that it should move, and no other"


def _sizes_in(patient: Patient) -> list[int]:
    """Sizes of the axes of buffers and parameters, which may be the one length that a candidate takes."""
    tensors = [t for module in patient.modules() for t in (*module.parameters(), *module.buffers())]
    return sorted({size for t in tensors if t.ndim > 1 for size in t.shape if 3 < size <= 512})


def _is_fading(output: Tensor) -> bool:
    """Whether outputs of equal tokens differ by a factor that only rises or only falls along the sequence."""
    steps = output[:, 1:] - output[:, :1]
    u, s, _ = torch.linalg.svd(steps, full_matrices=False)
    along = u[..., 0]
    change = along[:, 1:] - along[:, :-1]
    monotone = ((change > -1e-6).all(dim=1) | (change < 1e-6).all(dim=1)).all()
    return bool(monotone and (s[:, 1] < 1e-3 * s[:, 0].clamp_min(1e-30)).all())
