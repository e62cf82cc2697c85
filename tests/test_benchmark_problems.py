"""The benchmark's windows, packed sequences and padding: what they are, who solves them, how pairs are counted."""

import json
import sys
import types
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from scripts import benchmark, contenders, packing
from scripts.benchmark import Timer, check, checked_case, main, ratios_by_contender
from scripts.contenders import Case, Contender, block_mask, case_of, exact, flash_attention, l2norm, make_inputs
from scripts.results import RESULTS

CPU = torch.device("cpu")
SMALL = ["--heads", "2", "--head-dim", "16", "--num-times", "2", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(Timer, "WARM_UP_S", 0.0)
    for module in ("flash_attn.cute", "flash_attn_interface"):  # not there, whatever is installed
        monkeypatch.setitem(sys.modules, module, None)


def case(**changes):
    return Case(**{**dict(batch=2, heads=4, kv_heads=2, seq_len=24, head_dim=16, dtype="float32", causal=False,
                          mask_prob=0.0, bias=False), **changes})  # fmt: skip


def shortly(problem):
    return benchmark._shapes([problem])


def packed(*lengths, **changes):
    return case(**{**changes, "batch": 1, "seq_len": sum(lengths), "lengths": lengths})


def report(path, *arguments):
    assert main([*SMALL, *arguments, f"--json={path / 'b.json'}"]) == 0
    return json.loads((path / "b.json").read_text())


def by_name(found):
    return {contender.name: contender for contender in found}


ITSELF_ALONE = case(window=(0, 0))  # whose gradients of q and k are 0
PROBLEMS = [
    case(window=(5, 0), causal=True),
    case(window=(3, 7)),
    case(window=(-1, 2)),
    case(window=(4, -1)),
    case(window=(100, 0), causal=True),
    packed(9, 0, 1, 14),
    packed(9, 1, 14, causal=True),
    packed(9, 1, 14, causal=True, window=(3, 0)),
    packed(8, 8, 8, window=(2, 5)),
    case(padding=("last", 0.25)),
    case(padding=("last", 0.25), causal=True),
    case(padding=("first", 0.25)),
    case(padding=("first", 0.25), causal=True),
]


def visible(problem):
    """(batch, queries, keys), True where a query sees a key, by the definition of each option."""
    size = problem.seq_len
    sequence = torch.arange(len(problem.lengths or (size,))).repeat_interleave(torch.tensor(problem.lengths or (size,)))
    left, right = (size if side < 0 else side for side in problem.window or (-1, -1))
    inputs = make_inputs(problem, CPU)
    seen = torch.zeros(problem.batch, size, size, dtype=torch.bool)
    for i in range(size):
        for j in range(size):
            inside = i - left <= j <= i + right and not (problem.causal and j > i)
            seen[:, i, j] = inside and bool(sequence[i] == sequence[j])
    return seen if inputs.mask is None else seen & inputs.mask[:, None, :]


# What they are.


@pytest.mark.parametrize("problem", [*PROBLEMS, ITSELF_ALONE], ids=shortly)
def test_visible_pairs_are_counted(problem):
    assert problem.flops() == 4 * visible(problem).sum() * problem.heads * problem.head_dim


@pytest.mark.parametrize("problem", [*PROBLEMS, ITSELF_ALONE], ids=shortly)
@pytest.mark.parametrize("cosine", [True, False])
def test_float64_attention_sees_the_visible_pairs_alone(problem, cosine):
    inputs = make_inputs(problem, CPU)
    q, k, v = inputs.q.double(), inputs.k.double().repeat_interleave(2, 1), inputs.v.double().repeat_interleave(2, 1)
    q, k = l2norm(q, k) if cosine else (q, k)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (contenders.SCALE if cosine else problem.head_dim**-0.5)
    weights = scores.exp() * visible(problem)[:, None]
    o = weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-30)  # zeros where nothing is seen
    torch.testing.assert_close(exact(inputs, problem, cosine)[0], o)


def test_padding_hides_the_first_or_the_last_keys():
    first, last = (make_inputs(case(padding=(place, 0.25)), CPU).mask for place in ("first", "last"))
    hidden = [False] * 6
    assert first.tolist() == [hidden + [True] * 18] * 2 and last.tolist() == [[True] * 18 + hidden] * 2


def test_packed_sequences_lie_one_behind_the_other_and_say_where_they_end():
    inputs = make_inputs(packed(9, 0, 1, 14), CPU)
    assert inputs.cu_seqlens.tolist() == [0, 9, 9, 10, 24] and inputs.cu_seqlens.dtype == torch.int32
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.do, inputs.leaf().q, inputs.detached().k):
        assert tensor.squeeze(0).transpose(0, 1).is_contiguous() and tensor.shape[2] == 24
    assert inputs.leaf().cu_seqlens is inputs.cu_seqlens


def test_a_row_of_json_is_its_problem_again():
    for problem in PROBLEMS:
        assert case_of(json.loads(json.dumps({**benchmark.asdict(problem), "contender": "x"}))) == problem
    old = benchmark.asdict(case())
    for name in ("window", "lengths", "padding"):
        del old[name]
    assert case_of(old) == case()


def test_what_is_checked_is_smaller_in_proportion():
    whole = case(batch=8, seq_len=8192, causal=True, window=(1024, 0))
    assert checked_case(whole) == case(batch=2, seq_len=2048, causal=True, window=(256, 0))
    assert checked_case(case(batch=1, seq_len=1000, window=(-1, 3))) == case(batch=1, seq_len=1000, window=(-1, 3))
    lists = packed(8192, 0, 8190, 2, window=(512, 4))
    assert checked_case(lists) == packed(2048, 0, 2048, 1, window=(128, 1))
    assert checked_case(packed(2048, 2048)) == packed(2048, 2048)


# Who solves them.


@pytest.mark.parametrize("problem", PROBLEMS, ids=shortly)
def test_contenders_are_right_or_say_why_not(problem):
    found = by_name(contenders.contenders(["sdpa", "reference"], CPU, problems=[problem])[0])
    errors, refused = check(list(found.values()), problem, CPU)
    right = found.keys() - refused.keys()
    assert {"ours (sdpa)", "ours (reference)"} <= right
    assert all(max(errors[name].values()) < 1e-5 for name in right)
    if problem.lengths:
        assert refused["naive einsum"] == refused["SDPA flash, no norm"] == "it takes no packed sequences"
    elif problem.padding != ("first", 0.25):
        assert "naive einsum" in right and any("SDPA flash" in name for name in right)


def test_ours_as_a_batch_is_there_where_all_sequences_are_of_one_length():
    def names(*problems):
        return {name for name in by_name(contenders.contenders(["sdpa"], CPU, problems=problems)[0]) if "batch" in name}

    assert names(packed(8, 8), packed(4, 4, 4, 4)) == {"ours (sdpa), as a batch"}
    assert names(packed(8, 8), packed(8, 9)) == names(case()) == names() == set()
    found = contenders.contenders(["sdpa"], CPU, problems=[packed(8, 8, causal=True)])[0]
    inputs = make_inputs(packed(8, 8, causal=True), CPU)
    one, other = (by_name(found)[name] for name in ("ours (sdpa)", "ours (sdpa), as a batch"))
    for problem in (packed(8, 8, causal=True), packed(8, 8, window=(2, 1))):
        torch.testing.assert_close(other.attend(inputs, problem), one.attend(inputs, problem))


def flash_package(calls):
    """FlashAttention's two functions with the arguments that it has, by SDPA over a mask."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(None, None)):
        calls.append(window_size)
        query, key = torch.arange(q.shape[1]).unsqueeze(1), torch.arange(k.shape[1])
        left, right = (q.shape[1] if side is None else side for side in window_size)
        seen = (query - key <= left) & (key - query <= (0 if causal else right))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True)
        return o.transpose(1, 2), None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, **options
    ):  # the fourth is not cu_seqlens_q, so that these have to be named
        assert qv is None and q.ndim == 3 and q.is_contiguous() and cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        sequences = (tensor.split(cu_seqlens_q.diff().tolist()) for tensor in (q, k, v))
        parts = [
            flash_attn_func(*(part[None] for part in parts), **options)[0][0] for parts in zip(*sequences, strict=True)
        ]
        return torch.cat(parts), None

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("problem", PROBLEMS[:-4], ids=shortly)
@pytest.mark.parametrize("norm", [l2norm, None])
def test_flash_attention_gets_windows_and_packed_sequences(problem, norm):
    calls, problem = [], contenders.replace(problem, dtype="bfloat16")
    attend = partial(flash_attention, package=flash_package(calls), unlimited=None, norm=norm)
    errors, refused = check([Contender("FA", attend, norm is not None)], problem, CPU)
    assert not refused and max(errors["FA"].values()) < 3e-2
    left, right = problem.limits()
    limits = (None if left < 0 else left, None if right < 0 else right)
    assert set(calls) == {limits if problem.window else (None, None)}


def test_flash_attention_is_loaded_with_the_name_that_it_has_for_unlimited(monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", flash_package(calls))
    fa3 = types.SimpleNamespace(flash_attn_func=lambda q, *_, **options: calls.append(options["window_size"]) or q)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fa3)
    problem = case(window=(-1, 3), dtype="bfloat16", kv_heads=4)
    found, absent = contenders.contenders(["sdpa"], CPU, problems=[problem])
    assert absent == ["predecessor (--predecessor)"]
    for number in (4, 3):
        by_name(found)[f"FlashAttention-{number}, no norm"].attend(make_inputs(problem, CPU), problem)
    assert calls == [(None, 3), (-1, 3)]


def test_a_gpu_has_compiled_contenders_of_windows_and_packed_sequences(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", flash_package([]))

    def added(problem):
        """Those that an ordinary problem does not have; nothing runs, so no GPU has to be there."""
        lists = [contenders.contenders(["cuda"], torch.device("cuda"), problems=[one])[0] for one in (problem, case())]
        named, ordinary = map(by_name, lists)
        return {name: contender.cosine for name, contender in named.items() if name not in ordinary}

    flex = {"compiled l2norm + flex_attention": True, "flex_attention, no norm": False}
    by_flash = {name.replace("flex_attention", "flex_attention by FlashAttention-4"): flex[name] for name in flex}
    assert added(case(window=(4, 0))) == flex | by_flash
    varlen = {"varlen_attn, no norm": False, "varlen_attn by FlashAttention-4, no norm": False}
    assert added(packed(9, 1)) == varlen
    assert added(case(padding=("last", 0.5))) == {"ours (cuda), unmasked": True}
    ordinary = by_name(contenders.contenders(["cuda"], torch.device("cuda"), problems=[case()])[0])
    assert ordinary["compiled l2norm + FlashAttention-4"].cosine
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert added(case(window=(4, 0))) == flex and added(packed(9, 1)) == {"varlen_attn, no norm": False}


def test_pytorchs_flash_attention_is_another_one_in_its_calls_alone(monkeypatch):
    active = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear)
    contender = contenders.Contender("one", lambda *_: None, False, flash="FA4")
    with pytest.raises(KeyError), contender.setting():
        assert active == ["FA4"]
        raise KeyError
    assert active == []


def test_flex_attention_is_asked_for_flash_attentions_kernels(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    monkeypatch.setattr(
        contenders, "flex_attention", lambda *_, kernel_options, **__: asked.append(kernel_options) or torch.zeros(1)
    )
    contenders.compiled_flex.cache_clear()
    problem = case(window=(4, 0), by_distance="alibi")
    contenders.flex(make_inputs(problem, CPU).detached(), problem, True, package=types.ModuleType("flash_attn.cute"))
    contenders.compiled_flex.cache_clear()
    assert asked == [{"BACKEND": "FLASH"}]


@pytest.mark.parametrize("problem", [packed(9, 1, 14, causal=True, window=(3, 0)), packed(9, 1, 14, causal=True)])
def test_varlen_attn_gets_a_causal_mask_as_a_window(monkeypatch, problem):
    calls = []

    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        calls.append((window_size, enable_gqa))
        names = {"cu_seqlens_q": cu_seq_q, "cu_seqlens_k": cu_seq_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        window = tuple(None if side < 0 else side for side in window_size)
        return flash_package([]).flash_attn_varlen_func(q, k, v, **names, window_size=window)[0]

    package = types.SimpleNamespace(varlen_attn=varlen_attn)
    monkeypatch.setitem(sys.modules, contenders.VARLEN_MODULE, package)
    monkeypatch.setattr(torch.nn.attention, "varlen", package, raising=False)
    found = by_name(contenders.contenders(["sdpa"], CPU, problems=[problem])[0])
    errors, refused = check([found["varlen_attn, no norm"]], problem, CPU)
    assert not refused and max(errors["varlen_attn, no norm"].values()) < 1e-5
    assert set(calls) == {(problem.limits(), True)}


def test_a_torch_without_varlen_attn_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, contenders.VARLEN_MODULE, None)
    assert "varlen_attn" in contenders.contenders(["sdpa"], CPU, problems=[packed(8)])[1]
    assert "varlen_attn" not in contenders.contenders(["sdpa"], CPU, problems=[case()])[1]


@pytest.mark.parametrize("problem", [case(seq_len=300, **options) for options in (
    {"causal": True, "window": (20, 0)}, {"window": (5, 140)}, {"window": (-1, 3)},
    {"causal": True, "by_distance": "table"}, {"by_distance": "alibi"})], ids=shortly)  # fmt: skip
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_has_the_mask_of_the_window_and_the_score_of_the_distance(monkeypatch, problem):
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda function: function))
    contenders.compiled_flex.cache_clear()
    inputs = make_inputs(problem, CPU)
    for normalise in (True, False):
        with torch.no_grad():  # it has no gradient on a CPU
            o = contenders.flex(inputs.detached(), problem, normalise)
        torch.testing.assert_close(o, exact(inputs, problem, normalise)[0].float(), rtol=1e-4, atol=1e-5)
    contenders.compiled_flex.cache_clear()
    blocks = block_mask(problem.queries, problem.seq_len, problem.limits(), CPU)
    assert blocks is block_mask(problem.queries, problem.seq_len, problem.limits(), CPU)  # made once
    if problem.window == (20, 0):
        assert 0 < blocks.sparsity() < 100  # blocks outside are skipped
    for refused in (case(mask_prob=0.5), case(bias=True), packed(9, 1)):
        with pytest.raises(ValueError, match="it takes no mask, no bias and no packed sequences"):
            contenders.flex(make_inputs(refused, CPU), refused, True)


@pytest.mark.parametrize(("needed", "expected"), [
    ("", [""]),
    ("fwd", ["", "fwd"]),
    ("bwd", ["", "fwd", "bwd"]),
    ("fwd bwd", ["", "fwd", "bwd", "fwd bwd"]),
])  # fmt: skip
def test_flex_attention_that_lacks_shared_memory_gets_smaller_tiles(monkeypatch, needed, expected):
    tried, attend = stand_in_for_flex(monkeypatch, lambda tiles: set(needed.split()) <= set(tiles.split()))
    attend(gradient=True)
    # One after the other, then the call itself, which alone tries the last.
    assert tried == (expected if needed == "fwd bwd" else [*expected, expected[-1]])
    tried.clear()
    attend(gradient=True)
    assert tried == [expected[-1]]  # it is known now
    tried.clear()
    attend(gradient=False)
    assert tried == (["", "fwd", "fwd"] if "fwd" in needed else ["", ""])


def test_flex_attention_that_no_tiles_help_says_why(monkeypatch):
    tried, attend = stand_in_for_flex(monkeypatch, lambda _: False)
    with pytest.raises(RuntimeError, match="No valid triton configs"):
        attend(gradient=True)
    assert tried == ["", "fwd", "bwd", "fwd bwd"]
    tried, attend = stand_in_for_flex(monkeypatch, lambda _: False, "another reason")
    with pytest.raises(RuntimeError, match="another reason"):
        attend(gradient=True)
    assert tried == [""]  # which smaller tiles are no cure for


LACKING = "No valid triton configs. OutOfResources: out of resource: shared memory, Required: 245760"


def stand_in_for_flex(monkeypatch, fits, reason=LACKING):
    """A list of the tiles that were smaller in each call of flex_attention, "fwd bwd" being both, and a function that
    calls contenders.flex. What does not fit raises: forward, or, as it is compiled when it first runs, backward.
    """
    tried, problem = [], case(kv_heads=4, dtype="bfloat16")  # of which PyTorch's tiles are large both ways
    inputs = make_inputs(problem, CPU)

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, tiles):
            ctx.tiles = tiles
            if not fits(f"{tiles} bwd"):
                raise RuntimeError(reason)
            return q + k + v

        @staticmethod
        def backward(ctx, do):
            if not fits(ctx.tiles):
                raise RuntimeError(reason)
            return do, do, do, None

    def flex_attention(q, k, v, *_, kernel_options, **__):
        tried.append(" ".join(dict.fromkeys(option.split("_")[0] for option in kernel_options or ())))
        return Attend.apply(q, k, v, tried[-1])

    def attend(gradient):
        o = contenders.flex(inputs if gradient else inputs.detached(), problem, normalise=False)
        if gradient:
            torch.autograd.grad(o, inputs.leaves(), inputs.do)

    monkeypatch.setattr(torch, "compile", lambda **_: lambda function: function)
    monkeypatch.setattr(contenders, "flex_attention", flex_attention)
    for name in ("compiled_flex", "_tiles_that_fit"):  # caches of their own, gone with the test
        function = getattr(contenders, name)
        monkeypatch.setattr(contenders, name, cache(getattr(function, "__wrapped__", function)))
    return tried, attend


@pytest.mark.parametrize("changes", [{"causal": True}, {}, {"window": (5, 2)}], ids=str)
@pytest.mark.parametrize("by_distance", ["table", "alibi"])
def test_contenders_of_what_distances_add(by_distance, changes):
    """Ours, the dense bias that it stands for, and ours of the problem without it."""
    problem = case(by_distance=by_distance, kv_heads=4, **changes)
    found = by_name(contenders.contenders(["sdpa"], CPU, problems=[problem])[0])
    errors, refused = check(list(found.values()), problem, CPU)
    right = {"ours (sdpa)", "ours (sdpa), a dense bias", "ours (sdpa), without it", "naive einsum"}
    assert right <= errors.keys() - refused.keys()
    assert max(error for name in right for error in errors[name].values()) < 1e-5
    assert ("dtable" in errors["ours (sdpa)"]) == (by_distance == "table")
    assert found["ours (sdpa), without it"].problem(problem) == case(kv_heads=4, **changes)
    inputs = make_inputs(problem, CPU)
    bias = contenders.dense_bias(inputs, problem)
    t = torch.arange(24)[:, None] - torch.arange(24)
    if by_distance == "alibi":
        assert torch.equal(bias, -inputs.slopes.view(-1, 1, 1) * t.abs()) and inputs.slopes.tolist() == [
            0.25, 0.0625, 0.015625, 0.00390625,
        ]  # fmt: skip
    else:
        seen = t >= 0 if problem.causal else t > -24
        expected = inputs.table[:, (t + (0 if problem.causal else 23)).clamp(min=0)]
        assert torch.equal(bias[:, seen], expected[:, seen])
    with pytest.raises(ValueError, match="it takes float16 and bfloat16, no mask and no bias"):
        flash_attention(inputs, problem, flash_package([]), None)


@pytest.mark.parametrize("options", [["--distance-bias", "--alibi"], ["--alibi", "--padding", "last", "0.25"]])
def test_what_distances_add_goes_with_some_options_only(capsys, options):
    assert main([*SMALL, *options]) == 2
    assert "takes no --" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [
    case(seq_len=512, window=(100, 0), causal=True, head_dim=64, dtype="bfloat16"),
    packed(300, 1, 211, causal=True, head_dim=64, dtype="bfloat16", kv_heads=4),
    packed(256, 256, head_dim=64, dtype="bfloat16", kv_heads=4),
    case(seq_len=512, padding=("last", 0.25), head_dim=64, dtype="bfloat16"),
    case(seq_len=512, by_distance="table", causal=True, head_dim=64, dtype="bfloat16"),
    case(seq_len=512, by_distance="alibi", head_dim=64, dtype="bfloat16"),
], ids=shortly)  # fmt: skip
def test_on_a_gpu_contenders_are_right(problem):
    device = torch.device("cuda")
    found = by_name(contenders.contenders(["cuda"], device, problems=[problem])[0])
    _, refused = check(list(found.values()), problem, device)
    added = ["compiled l2norm + flex_attention", "flex_attention, no norm"] if problem.window else []
    added += ["varlen_attn, no norm"] if problem.lengths else []
    added += ["ours (cuda), unmasked"] if problem.padding else []
    added += ["ours (cuda), as a batch"] if problem.lengths == (256, 256) else []
    assert not refused.keys() & {"ours (cuda)", *added}, refused
    assert {"ours (cuda)", *added} <= found.keys()


# A run.


def test_a_window_is_timed_and_a_dense_mask_on_request_alone(tmp_path, capsys):
    options = ["--seq-len", "32", "--window", "4", "--causal", "--batch", "1"]
    rows = report(tmp_path, *options)["rows"]
    assert [row["contender"] for row in rows] == ["ours (auto)"] and rows[0]["window"] == [4, 0]
    printed = capsys.readouterr().out
    assert "window (4, 0)" in printed and "not timed: naive einsum, float32: a window is a mask over all" in printed
    names = {row["contender"] for row in report(tmp_path, *options, "--dense-mask")["rows"]}
    assert names >= {"ours (auto)", "naive einsum", "SDPA flash, no norm"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--window", "4"], (4, 4)),
        (["--window", "4", "--causal"], (4, 0)),
        (["--window", "-1", "3"], (-1, 3)),
        (["--window", "3", "-1"], (3, -1)),
    ],
)
def test_the_right_side_of_a_window_may_be_left_out(tmp_path, arguments, expected):
    (row,) = report(tmp_path, "--seq-len", "8", "--batch", "1", "--only-forwards", *arguments)["rows"]
    assert tuple(row["window"]) == expected


@pytest.mark.parametrize("by_distance", ["table", "alibi"])
def test_keys_that_were_normalised_when_cached_have_what_distances_add(by_distance):
    problem = case(seq_len_q=3, by_distance=by_distance, causal=False)
    found = by_name(contenders.contenders(["sdpa"], CPU, decoding=True, problems=[problem])[0])
    errors, refused = check([found["ours (sdpa), keys normalised when cached"]], problem, CPU)
    assert not refused and max(error for found in errors.values() for error in found.values()) < 1e-5


def test_a_window_as_a_mask_is_made_once_for_all_calls():
    problem = case(window=(5, 2))
    inputs = make_inputs(problem, CPU)
    made = []

    def attention(_q, _k, _v, attn_mask, **_):
        made.append(attn_mask)
        return inputs.q

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        for _ in range(2):
            contenders.sdpa(inputs, problem, normalise=False)
    assert made[0] is made[1] and made[0].any() and not made[0].all()


def test_packed_lists_are_walked_and_summed_up(tmp_path, capsys, monkeypatch):
    found = contenders.contenders(["sdpa"], CPU)[0][0]
    monkeypatch.setattr(benchmark, "contenders", lambda *_: ([found, Contender("other", found.attend, True)], []))
    (tmp_path / "lists.json").write_text("[[9, 0, 1], [3, 17]]")
    options = ["--packed", "2x8,4", str(tmp_path / "lists.json"), "2x8,4", "--causal"]  # the first one twice
    rows = report(tmp_path, *options)["rows"]
    lists = [[8, 8, 4], [9, 0, 1], [3, 17]]
    assert [(row["lengths"], row["seq_len"], row["batch"]) for row in rows[::2]] == [(x, sum(x), 1) for x in lists]
    printed = capsys.readouterr().out
    assert "packed 3 of 4 to 8" in printed and "over all lists: median, lowest" in printed
    assert "over all lists" not in (main([*SMALL, "--packed", "2x8"]) or capsys.readouterr().out)


def test_ratios_over_lists_are_of_the_same_list():
    def row(name, lengths, **times):
        return {**benchmark.asdict(packed(*lengths)), "contender": name, **times}

    rows = [
        row("other", (4, 4), forward_ms=3.0, both_ms=5.0),
        row("ours (cuda)", (4, 4), forward_ms=1.0, both_ms=2.0),
        row("ours (cuda)", (8,), forward_ms=2.0, both_ms=4.0),
        row("ours (sdpa)", (8,), forward_ms=8.0),
        row("other", (8,), forward_ms=3.0, error="out of memory"),
    ]
    expected = {"other": {"forward_ms": [3.0, 1.5], "both_ms": [2.5]}, "ours (sdpa)": {"forward_ms": [4.0]}}
    assert ratios_by_contender(rows) == expected
    table = benchmark._lists_table([packed(4, 4), packed(8)], ratios_by_contender(rows))
    columns = [list(column.cells) for column in table.columns]
    assert columns == [["other", "ours (sdpa)"], ["2.25, 1.50", "4.00, 4.00"], ["2.50, 2.50", "-"]]


def test_padding_is_timed_beside_ours_without_the_mask(tmp_path, capsys):
    options = ["--seq-len", "32", "--padding", "last", "0.25", "--each-direction", "--contenders", "ours"]
    found = report(tmp_path, *options)
    masked, unmasked = found["rows"]
    assert (masked["contender"], masked["padding"]) == ("ours (auto)", ["last", 0.25])
    assert (unmasked["contender"], unmasked["padding"]) == ("ours (auto), unmasked", None)
    assert all(row[key] > 0 for row in found["rows"] for key in ("forward_ms", "backward_ms", "both_ms"))
    assert {row["contender"]: row["o"] < 1e-5 for row in found["accuracy"]} == {
        "ours (auto)": True, "ours (auto), unmasked": True
    }  # fmt: skip
    assert "last 0.25 of the keys hidden" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", "-1"], "--window must be LEFT [RIGHT], of which one is not -1, RIGHT being 0 with --causal; got"),
        (["--window", "1", "2", "3"], "got 1 2 3"),
        (["--window", "4", "2", "--causal"], "RIGHT being 0 with --causal; got 4 2"),
        (["--window", "-2"], "must be an integer of at least -1, got '-2'"),
        (["--window", "4", "--seq-len-q", "1"], "--window takes no --seq-len-q"),
        (["--window", "4", "--padding", "last", "0.5"], "--window takes no --padding"),
        (["--dense-mask"], "--dense-mask needs --window"),
        (["--packed", "8x2", "--seq-len", "16"], "--packed takes no --seq-len"),
        (["--packed", "8x2", "--plot", "x.png"], "--packed takes no --plot"),
        (["--packed", "0,0"], "of which one is not 0, or a JSON file with lists of lengths; got 0,0"),
        (["--packed", "nowhere.json"], "got 'nowhere.json', and there is no such file"),
        (["--padding", "middle", "0.5"], "--padding must be last or first and a number in (0, 1), got middle 0.5"),
        (["--padding", "last", "1"], "a number in (0, 1), got last 1"),
        (["--padding", "last", "0.5", "--mask-prob", "0.5"], "--padding takes no --mask-prob"),
        (["--padding", "last", "0.01", "--seq-len", "8"], "must hide some keys, not all: 0.01 hides 0 of 8 keys"),
        (["--padding", "last", "0.99", "--seq-len", "8"], "must hide some keys, not all: 0.99 hides 8 of 8 keys"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_preset_of_one_width_takes_lengths_of_its_tokens(capsys, monkeypatch):
    options = ["--device", "cpu", "--preset", "hidden2048", "--packed"]
    assert main([*options, "8x1024"]) == 2
    assert "takes --packed lengths that add up to 16384, got 8192" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(benchmark, "check", lambda _found, checked, _device: asked.append(checked) or ({}, {}))
    monkeypatch.setattr(benchmark, "measure", lambda _contender, case, **_: asked.append(case) or {"both_ms": 1.0})
    assert main([*options, "8x2048", "--contenders", "batch"]) == 0
    (checked, timed), shape = asked, {"heads": 32, "kv_heads": 32, "head_dim": 64, "dtype": "bfloat16"}
    assert timed == packed(*[2048] * 8, **shape) and checked == packed(*[512] * 8, **shape)


# Lengths.


def test_the_lists_that_are_measured_are_those_of_the_seed():
    lists = json.loads((RESULTS / "packed" / "lengths.json").read_text())
    assert lists == packing.seeded_lengths()
    assert len(lists) == 10 and len({tuple(lengths) for lengths in lists}) == 10
    assert all(sum(lengths) == 16384 and 64 <= min(lengths) and max(lengths) <= 4096 for lengths in lists)


def test_lists_of_lengths_stay_within_their_bounds_whatever_the_seed():
    for seed in range(50):
        for lengths in packing.seeded_lengths(seed, count=4, total=500, shortest=16, longest=64):
            assert sum(lengths) == 500 and 16 <= min(lengths) and max(lengths) <= 64


def test_lengths_are_read(tmp_path):
    assert packing.read_lengths("3x5,0,7") == [(5, 5, 5, 0, 7)]
    path = tmp_path / "lists.json"
    path.write_text("[[1, 2], [3]]")
    assert packing.read_lengths(str(path)) == [(1, 2), (3,)]
    for wrong in ("[]", "[1, 2]", "[[1.5]]", "[[-1]]", "[[0]]", "[[]]", "{}", "[[true]]", "["):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="--packed must be lengths such as 8x2048"):
            packing.read_lengths(str(path))
    assert packing.described((4, 4)) == "2 x 4" and packing.described((4, 9, 6)) == "3 of 4 to 9"
