"""Rows with an advantage each, on their way through a collator into a patched model: the part all hosts share."""

from __future__ import annotations

import chat_tokenizers
import host_rig
import pytest
import torch
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from gft_kernels import group_advantages
from gft_kernels.integrations.response_rows import (
    COLUMN,
    CarryAdvantages,
    check_loss_options,
    encode_row,
    patch_for_rows,
    response_rows,
)
from gft_kernels.model.patch import unpatch_model

ENCODED = host_rig.encoded_rows()


@pytest.fixture
def folder(tmp_path):
    host_rig.write_model(tmp_path / "model")
    return tmp_path / "model"


def patched(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return patch_for_rows(model, **{"tau": host_rig.TAU, **options})


def collator(side: str = "right"):
    tokenizer = host_rig.tokenizer()
    tokenizer.padding_side = side
    return CarryAdvantages(DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8), side)


def test_each_response_gets_the_advantage_of_its_group():
    groups = [
        {"prompt": "A>", "responses": ["1.", "2.", "3."], "rewards": [1, 0, 0.5], "answer": "1"},
        {"prompt": "B>", "responses": ["4.", "5."], "rewards": [2, 2]},
    ]
    found = response_rows(groups, normalize="mean")
    assert [row["response"] for row in found] == ["1.", "2.", "3.", "4.", "5."]
    assert [row[COLUMN] for row in found] == pytest.approx([0.5, -0.5, 0.0, 0.0, 0.0])
    assert found[0]["answer"] == "1" and "rewards" not in found[0] and "responses" not in found[0]
    standardised = group_advantages(torch.tensor([1.0, 0.0, 0.5]), group_size=3)
    assert [row[COLUMN] for row in response_rows(groups)[:3]] == pytest.approx(standardised.tolist())


@pytest.mark.parametrize(
    "row",
    [{"prompt": "A>"}, {"prompt": "A>", "responses": ["1."], "rewards": [1.0, 2.0]},
     {"prompt": "A>", "responses": ["1.", "2."], "rewards": [2**60, 2**60 + 1]}],
)  # fmt: skip
def test_a_malformed_row_is_named(row):
    with pytest.raises(ValueError, match=r"rows\[1\]: field `re"):
        response_rows([{"prompt": "A>", "responses": ["1."], "rewards": [1.0]}, row])


@pytest.mark.parametrize("name", ["response", COLUMN, "completions"])
def test_a_column_does_not_take_the_place_of_what_is_written(name):
    with pytest.raises(ValueError, match=rf"rows\[0\]: field `{name}` must have another name"):
        response_rows([{"prompt": "A>", "responses": ["1."], "rewards": [1.0], name: "mine"}])


@pytest.mark.parametrize("style", sorted(chat_tokenizers.STYLES))
def test_a_response_to_messages_ends_as_its_template_closes_a_turn(style):
    tokenizer, of = chat_tokenizers.tokenizer(style), chat_tokenizers.STYLES[style]
    prompt = [{"role": "user", "content": "q"}]
    for stored in ("a x", f"a x{of.end}", f"a x{of.eos}"):
        row = encode_row({"prompt": prompt, "response": stored, COLUMN: 0.5}, tokenizer)
        labels = [label for label in row["labels"] if label != -100]
        assert tokenizer.convert_ids_to_tokens(labels) == ["a", " ", "x", of.end]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batches_give_the_formulas_gradients(folder, side):
    model = patched(folder, counted=False)
    part = [dict(row) for row in ENCODED[:8]]
    batch = collator(side)(part)
    assert batch[COLUMN].tolist() == pytest.approx([row[COLUMN] for row in part])
    model(**batch).loss.backward()
    seen = host_rig.Gradients()
    seen.on_pre_optimizer_step(None, None, None, model=model)
    host_rig.assert_steps(seen, host_rig.expected_steps(folder, ENCODED[:8]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_carry_one_advantage_a_token(side):
    """A collator that joins rows, as those of packing trainers do."""
    lengths = [len(row["input_ids"]) for row in ENCODED[:5]]

    def joining(packs):
        assert all(COLUMN not in row for pack in packs for row in pack)
        labels = [[label for row in pack for label in row["labels"]] for pack in packs]
        width = max(map(len, labels)) + 3
        fill = [[-100] * (width - len(row)) for row in labels]
        pairs = zip(labels, fill, strict=True)
        return {"labels": torch.tensor([f + row if side == "left" else row + f for row, f in pairs])}

    batch = CarryAdvantages(joining, side)([[dict(r) for r in ENCODED[:2]], [dict(r) for r in ENCODED[2:5]]])
    assert batch[COLUMN].shape == batch["labels"].shape
    for index, row in enumerate(ENCODED[:5]):
        pack, before = (0, lengths[:index]) if index < 2 else (1, lengths[2:index])
        spare = batch["labels"].shape[1] - sum(lengths[:2] if pack == 0 else lengths[2:])
        start = sum(before) + (spare if side == "left" else 0)
        assert batch[COLUMN][pack, start : start + lengths[index]].tolist() == pytest.approx(
            [row[COLUMN]] * lengths[index]
        )
        padding = batch[COLUMN][pack, :spare] if side == "left" else batch[COLUMN][pack, -spare:]
        assert padding.abs().max() == 0


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_step_does_not_depend_on_how_it_is_cut(folder, tmp_path, micro_batch, accumulation):
    """transformers.Trainer, from which the trainers of axolotl, LLaMA-Factory and ms-swift inherit."""
    seen = host_rig.Gradients()
    args = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation,
        learning_rate=0.0, max_grad_norm=0.0, num_train_epochs=1, train_sampling_strategy="sequential",
        logging_steps=1, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(patched(folder), args, train_dataset=ENCODED, data_collator=collator(), callbacks=[seen])
    trainer.train()
    host_rig.assert_steps(seen, host_rig.expected_steps(folder, ENCODED))


def test_what_a_trainer_forgets_is_an_error(folder):
    batch = dict(collator()([dict(row) for row in ENCODED[:2]]))
    model = patched(folder).train()
    with pytest.raises(ValueError, match="num_items_in_batch must come with every training batch"):
        model(**batch)
    with pytest.raises(ValueError, match="labels must come with every training call"):
        model(input_ids=batch["input_ids"])
    bare = {name: value for name, value in batch.items() if name != COLUMN}
    with pytest.raises(ValueError, match="gft_advantages must come with every row"):
        model(**bare, num_items_in_batch=10)
    with pytest.raises(ValueError, match="gft_advantages must come with every row"):
        model(**{**batch, COLUMN: [1.0, None]}, num_items_in_batch=10)
    model.eval()
    assert model(**batch).loss.isfinite() and model(input_ids=batch["input_ids"]).logits is not None
    with pytest.raises(ValueError, match="every row must have the column gft_advantages"):
        collator()([{"input_ids": [3], "labels": [3]}])


def test_an_unpatched_model_is_no_longer_guarded(folder):
    model = unpatch_model(patched(folder)).train()
    ids = torch.tensor([ENCODED[0]["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss.isfinite() and model(input_ids=ids).logits is not None


def test_a_list_of_advantages_is_as_good_as_a_tensor(folder):
    batch = dict(collator()([dict(row) for row in ENCODED[:3]]))
    model = patched(folder, counted=False)
    as_list = model(**{**batch, COLUMN: batch[COLUMN].tolist()}).loss
    assert as_list.item() == model(**batch).loss.item() != 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": -0.1}, ValueError, r"tau must lie in \[0, 1\]"),
        ({"taw": 0.1}, TypeError, "taw must be an option of policy_loss"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
        ({"advantages": torch.ones(1)}, TypeError, "advantages must be left out"),
        ({"softcap": 3.0}, TypeError, "softcap must be left out"),
        ({"objective": "grpo"}, ValueError, "objective must be 'gft' with rows"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'token-mean' with rows, got 'sum'"),
        ({"reduction": "sequence-mean"}, ValueError, "reduction must be 'token-mean' with rows"),
    ],
)
def test_options_are_checked_by_name_and_value(options, error, message):
    assert check_loss_options({"tau": 0.3, "backend": "triton"}) == {"tau": 0.3, "backend": "triton"}
    with pytest.raises(error, match=message):
        check_loss_options(options)
