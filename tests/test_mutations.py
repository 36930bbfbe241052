"""Break lora.py in every way that people do, and see that a law goes red.

Each mutation is a change of the source text, and the law of tests/test_lora.py that
must find it. (A well-known LoRA test passes with the bypass dead.)
"""

import importlib.util
import inspect

import pytest
import test_lora as laws

from peftlab import lora

SOURCE = inspect.getsource(lora)
SCALING = "alpha / math.sqrt(r) if rslora else alpha / r"
RETURN = "return (y + (low * self.scaling) @ self.lora_B.T).to(y.dtype)"
KAIMING = "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))"
DELTA = "m.scaling * (m.lora_B @ m.lora_A)"
BYPASS = laws.test_the_bypass_adds_alpha_over_r_times_b_a_x
RSLORA = laws.test_rslora_scales_by_alpha_over_the_root_of_r
START = laws.test_adding_lora_changes_no_output
GRADIENT = laws.test_the_first_gradient_reaches_b_and_not_a
RANK = laws.test_the_change_after_training_has_rank_r
FROZEN = laws.test_frozen_weights_are_bit_identical_after_training
MERGED = laws.test_merged_equals_unmerged_to_1e_10_in_float64
STRICT = laws.test_loading_is_strict
HEAD = laws.test_all_linear_leaves_out_the_output_head
HALF_WRONG = laws.test_a_half_wrong_target_list_is_refused

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "alpha / r is missing": (BYPASS, {SCALING: "1.0"}),
    "scaled by alpha": (BYPASS, {SCALING: "alpha"}),
    "scaled by alpha * r": (BYPASS, {SCALING: "alpha * r"}),
    "scaled by r / alpha": (BYPASS, {SCALING: "r / alpha"}),
    "rsLoRA is ignored": (RSLORA, {SCALING: "alpha / r"}),
    "the bypass is dead": (BYPASS, {RETURN: "return y"}),
    "the base is dropped": (START, {RETURN: RETURN.replace("y + ", "", 1)}),
    "the answer is in float32": (
        laws.test_a_and_b_are_float32_over_a_16_bit_base,
        {RETURN: RETURN.removesuffix(".to(y.dtype)")},
    ),
    "A and B are both zero": (
        GRADIENT,
        {KAIMING: "self.lora_A.data *= 0"},
    ),
    "A and B are both random": (START, {"torch.zeros(n_out": "torch.randn(n_out"}),
    "A is zero and B random": (
        GRADIENT,
        {
            "torch.zeros(n_out": "torch.randn(n_out",
            KAIMING: ("nn.init.zeros_(self.lora_A)"),
        },
    ),
    "A starts from another width": (
        laws.test_a_starts_uniform_within_one_over_the_root_of_its_width,
        {"a=math.sqrt(5)": "a=0"},
    ),
    "A and B are in the base's 16 bits": (
        laws.test_a_and_b_are_float32_over_a_16_bit_base,
        {"torch.float64 if w.dtype == torch.float64 else torch.float32": "w.dtype"},
    ),
    "the rank is one too many": (RANK, {"torch.empty(r,": "torch.empty(r := r + 1,"}),
    "the base is not frozen": (
        laws.test_only_a_and_b_train,
        {"    model.requires_grad_(False)\n    _replace": "    _replace"},
    ),
    "the base trains along": (
        FROZEN,
        {"model.requires_grad_(False)\n    _replace": "_replace"},
    ),
    "A and B are frozen too": (
        laws.test_only_a_and_b_train,
        {"p.requires_grad_(True)": "p.requires_grad_(False)"},
    ),
    "the product is transposed": (
        MERGED,
        {DELTA: "m.scaling * (m.lora_A.T @ m.lora_B.T)"},
    ),
    "a square product is transposed": (
        MERGED,
        {
            DELTA: f"{DELTA}\n        if delta.shape[0] == delta.shape[1]:"
            "\n            delta = delta.T"
        },
    ),
    "a Conv1D is merged untransposed": (
        MERGED,
        {'delta = delta.T if type(base).__name__ == "Conv1D" else delta': "pass"},
    ),
    "a Conv1D's width is read the wrong way": (
        laws.test_a_conv1d_is_wrapped_by_what_goes_in_and_out,
        {"m.weight.shape[::-1] if conv": "m.weight.shape if conv"},
    ),
    "merging forgets the scaling": (MERGED, {DELTA: "m.lora_B @ m.lora_A"}),
    "merging adds nothing": (MERGED, {"(base.weight + delta)": "(base.weight)"}),
    "merging writes into a tied weight": (
        laws.test_merging_a_tied_head_leaves_the_embedding_alone,
        {
            "base.weight = nn.Parameter((base.weight + delta).to(base.weight.dtype),"
            " False)": "base.weight += delta"
        },
    ),
    "merging rounds twice": (
        laws.test_merging_takes_a_16_bit_base_once_to_its_own_precision,
        {"(base.weight + delta)": "(base.weight + delta.to(base.weight.dtype))"},
    ),
    "merging leaves the wrappers": (
        laws.test_merging_leaves_plain_frozen_layers,
        {"_replace(model, layers)": "pass"},
    ),
    "merging leaves biases to train": (
        laws.test_merging_leaves_plain_frozen_layers,
        {"return model.requires_grad_(False)": "return model"},
    ),
    "one parent of two is wrapped": (
        laws.test_a_linear_with_two_parents_is_wrapped_once_and_merged_once,
        {"swaps.get(child, child)": "swaps.pop(child, child)"},
    ),
    "dropout stays on in eval mode": (
        laws.test_dropout_is_off_in_eval_mode,
        {"self.dropout(x.to(self.lora_A.dtype))": "nn.functional.dropout(x, 0.5)"},
    ),
    "dropout is on in a model that is in eval mode": (
        laws.test_dropout_is_off_at_once_on_a_model_in_eval_mode,
        {".train(m.training)": ""},
    ),
    "dropout is forgotten": (
        laws.test_dropout_thins_only_the_input_of_the_bypass,
        {"self.dropout(x.to(self.lora_A.dtype))": "x.to(self.lora_A.dtype)"},
    ),
    "dropout thins the base's input too": (
        laws.test_dropout_thins_only_the_input_of_the_bypass,
        {"y = self.base(x)": "y = self.base(x := self.dropout(x))"},
    ),
    "train() merges": (
        laws.test_train_and_eval_change_no_weight,
        {
            "    def forward(self, x):": "    def train(self, mode=True):\n"
            "        if not mode:\n"
            "            self.base.weight.data += 1e-3\n"
            "        return super().train(mode)\n\n"
            "    def forward(self, x):"
        },
    ),
    'bias="all" trains none': (
        laws.test_bias_all_trains_every_bias_and_no_other_base_weight,
        {'mode == "all"': "False"},
    ),
    'bias="lora_only" trains all': (
        laws.test_bias_lora_only_trains_the_biases_of_the_targets,
        {"and owner in layers": ""},
    ),
    "biases are named as in the wrapper": (
        laws.test_the_state_dict_names_biases_as_in_the_plain_model,
        {"found[plain if owner in layers else name]": "found[name]"},
    ),
    "a module called base loses its name": (
        laws.test_a_module_that_is_called_base_keeps_its_name,
        {"found[plain if owner in layers else name]": "found[plain]"},
    ),
    "the state dict leaves A out": (
        laws.test_the_state_dict_goes_round,
        {'leaf in ("lora_A", "lora_B")': 'leaf == "lora_B"'},
    ),
    "loading is not strict": (
        STRICT,
        {
            "if got != want:": "if want and got and got != want:",
            "t.copy_(tensors[name])": "t.copy_(tensors.get(name, t))",
        },
    ),
    "loading lets the unexpected pass": (
        STRICT,
        {"own.keys() | tensors.keys()": "own.keys()"},
    ),
    "a half-wrong target list is accepted": (
        HALF_WRONG,
        {
            "if lost := [": "if len(targets) == len(lost := [",
            "for p in linears)]:": ("for p in linears)]):"),
        },
    ),
    "the head is in all-linear": (HEAD, {"if m is not head}": "}"}),
    "the classifier is in all-linear": (
        laws.test_all_linear_leaves_out_a_classifier_and_a_score,
        {'{"classifier", "score"}': '{"score"}'},
    ),
    "a target matches the end of a name": (
        laws.test_a_target_matches_whole_names_from_the_end,
        {'endswith(f".{t}")': 'endswith(f"{t}")'},
    ),
    "LoRA goes on LoRA": (
        laws.test_adding_twice_is_refused,
        {"any(isinstance(m, LoRALinear) for m in model.modules())": "False"},
    ),
    "fused experts are passed over": (
        laws.test_fused_experts_are_refused_by_their_share,
        {'"expert" in n and d == 3': "False"},
    ),
}
RED = (AssertionError, pytest.fail.Exception, RuntimeError)  # the last: shapes clash


def module_of(source, tmp_path):
    path = tmp_path / "broken_lora.py"
    path.write_text(source, "utf8")
    spec = importlib.util.spec_from_file_location("broken_lora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_law_finds(name, tmp_path):
    law, changes = MUTATIONS[name]
    source = SOURCE
    for old, new in changes.items():
        assert old in source, f"lora.py no longer has {old!r}: write the mutation anew"
        source = source.replace(old, new)
    try:
        law(module_of(source, tmp_path))
    except RED:
        return
    pytest.fail(f"{law.__name__} does not notice that {name}")


def test_the_same_laws_pass_on_an_unbroken_copy(tmp_path):
    module = module_of(SOURCE, tmp_path)
    for law in {law for law, _ in MUTATIONS.values()}:
        law(module)


def test_each_law_has_a_mutation_that_it_finds():
    every = {
        law
        for law in vars(laws).values()
        if inspect.isfunction(law)
        and law.__name__.startswith("test_")
        and list(inspect.signature(law).parameters) == ["lora"]
    }
    idle = {law.__name__ for law in every - {law for law, _ in MUTATIONS.values()}}
    assert not idle, f"laws that no mutation puts to the test: {idle}"
