"""What each student is trained on: disjoint parts of the prompts, the data's own joint distribution inside each."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillers.corpus import Corpus, load_corpus
from distillers.data import Feed
from distillers.folder import BadData
from distillers.partition import FILE, make_partition, part_of, stored_partition, units
from tests.helpers import picture_folder, tiny_pipeline
from weights.contracts import DataSpec, PartitionSpec
from weights.families.stable_diffusion import StableDiffusion
from weights.router import route

ANGLES = {"ant": 0.0, "bee": 0.2, "insect": 0.1, "crow": 2.0, "hawk": 2.2, "bird": 2.1, "animal": 1.0, "moth": 0.3}


def embed(prompts: list[str]) -> Tensor:
    angles = torch.tensor([ANGLES[prompt] for prompt in prompts])
    return torch.stack([angles.cos(), angles.sin()], 1)


def corpus(**changes: object) -> Corpus:
    """Four pictures, each with a name, a kind, and what all have in common."""
    captions = ["ant", "insect", "animal", "bee", "crow", "bird", "hawk"]
    whole = Corpus(
        captions=captions,
        rows=[[0, 1, 2], [3, 1, 2], [4, 5, 2], [6, 5, 2]],
        weights=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
        odds=[[2.0, 1.0, 1.0]] * 4,
        pictures=None,
        prompts=None,
        sheet=captions,
        identity="",
        groups=["insects", "insects", "birds", "birds"],
        held_out=[("moth", "insects")],
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def spec(**fields: object) -> PartitionSpec:
    return PartitionSpec.model_validate({"students": 2, **fields})


def test_kmeans_parts_are_even_and_near() -> None:
    whole = corpus()
    found = make_partition(spec(), whole, embed, with_pictures=True)
    parts = [
        {text for text, label in zip(whole.captions, found.labels, strict=True) if label == part} for part in (0, 1)
    ]
    assert {"ant", "bee", "insect"} <= parts[int("ant" in parts[1])]
    assert {"crow", "hawk", "bird"} <= parts[int("crow" in parts[1])]
    assert sorted(map(len, parts)) == [3, 4] and parts[0] & parts[1] == set()
    assert torch.equal(route(embed(whole.captions), found.centroids, found.offsets), found.labels)
    metrics = found.metrics
    assert (metrics["train"], metrics["held_out"], metrics["held_out_captions"]) == (1.0, 1.0, 1)
    assert sorted(metrics["sizes"]) == [3, 4]
    assert metrics["cosine"] > metrics["cosine_of_one"]


def test_a_part_is_the_data_given_that_the_caption_is_in_it() -> None:
    """The parts' joint weights of picture and caption are the whole's, scaled to 1 in each."""
    whole = corpus()
    found = make_partition(spec(), whole, embed, with_pictures=True)
    assert whole.odds is not None
    for part in (0, 1):
        own = part_of(whole, found, part, with_pictures=True)
        assert own.odds is not None and own.captions == whole.captions and own.identity == whole.identity
        assert float(own.weights.sum()) == pytest.approx(1)
        joint, wanted = torch.zeros(4, 7), torch.zeros(4, 7)
        for picture, rows in enumerate(whole.rows):
            for place, row in enumerate(rows):
                if sum(own.odds[picture]):
                    joint[picture, row] = own.weights[picture] * own.odds[picture][place] / sum(own.odds[picture])
                if found.labels[row] == part:
                    wanted[picture, row] = whole.weights[picture] * whole.odds[picture][place] / 4
        torch.testing.assert_close(joint, wanted / wanted.sum())
        assert set(own.sheet) <= {
            text for text, label in zip(whole.captions, found.labels, strict=True) if label == part
        }


def test_groups_keep_together_and_a_shared_caption_goes_where_it_is_drawn_most() -> None:
    whole = corpus()
    found = make_partition(spec(by="groups"), whole, embed, with_pictures=True)
    assert found.labels.tolist() == [0, 0, 1, 0, 1, 1, 1], "'animal' is drawn for birds more often"
    assert found.metrics["sizes"] == [3, 4] and found.metrics["held_out"] == 1.0
    torch.testing.assert_close(found.centroids[0], embed(["insect"])[0], rtol=1e-3, atol=1e-3)
    wrong = replace(whole, held_out=[("moth", "birds"), ("moth", None)])
    metrics = make_partition(spec(by="groups"), wrong, embed, with_pictures=True).metrics
    assert (metrics["held_out"], metrics["held_out_captions"]) == (0.0, 1)


def test_prompts_are_cut_and_the_pictures_captions_are_routed() -> None:
    whole = corpus(captions=["ant", "insect", "animal", "bee", "crow", "bird", "hawk", "moth"], prompts=[7, 0, 5, 4])
    found = make_partition(spec(), whole, embed, with_pictures=True)
    assert units(whole) == [7, 0, 5, 4]
    insects, birds = int(found.labels[0]), int(found.labels[4])
    assert insects != birds
    assert found.labels.tolist()[3:] == [insects, birds, birds, birds, insects]
    assert found.metrics["sizes"] == [2, 2]
    own = part_of(whole, found, insects, with_pictures=True)
    assert own.drawn == [7, 0] and own.prompts == whole.prompts
    assert (own.weights > 0).tolist()[:2] == [True, True]
    alone = make_partition(spec(), whole, embed, with_pictures=False)
    assert (alone.labels == -1).tolist() == [False, True, True, True, False, False, True, False]
    prompts = part_of(whole, alone, int(alone.labels[0]), with_pictures=False)
    assert prompts.drawn == [7, 0] and torch.equal(prompts.weights, whole.weights)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(BadData, match=r"partition\.students: 7 points cannot be split into 8 parts"):
        make_partition(spec(students=8), corpus(), embed, with_pictures=True)
    with pytest.raises(BadData, match=r"partition\.students: 2 groups cannot be split into 3 parts"):
        make_partition(spec(students=3, by="groups"), corpus(), embed, with_pictures=True)
    missing = corpus(groups=["insects", None, "birds", None])
    with pytest.raises(BadData, match=r"2 of 4 have none \(the first is number 1\).*use 'kmeans'"):
        make_partition(spec(by="groups"), missing, embed, with_pictures=True)
    far = corpus(captions=[*corpus().captions, "moth"], rows=[[0], [0], [0], [0]], odds=None, prompts=[7, 0, 5, 4])
    found = make_partition(spec(), far, embed, with_pictures=True)
    with pytest.raises(BadData, match="no image has a caption that is routed to it"):
        part_of(far, found, int(found.labels[5]), with_pictures=True)


def test_the_partition_is_made_once_and_is_of_its_data(tmp_path: Path) -> None:
    def none(_: list[str]) -> Tensor:
        raise AssertionError("embedded again")

    made = stored_partition(tmp_path, spec(), corpus(), "base", embed, True)
    again = stored_partition(tmp_path, spec(order="parallel", part=1), corpus(), "base", none, True)
    assert torch.equal(made.labels, again.labels) and torch.equal(made.centroids, again.centroids)
    assert made.metrics == again.metrics and [path.name for path in tmp_path.iterdir()] == [FILE]
    changed = {
        "spec": spec(seed=1),
        "data": corpus(captions=["ant", *corpus().captions[1:-1], "eagle"]),
        "base": "other",
    }
    for what in changed:
        with pytest.raises(BadData, match="made for other prompts, another base or other partition settings"):
            stored_partition(
                tmp_path,
                changed["spec"] if what == "spec" else spec(),  # type: ignore[arg-type]
                changed["data"] if what == "data" else corpus(),  # type: ignore[arg-type]
                changed["base"] if what == "base" else "base",  # type: ignore[arg-type]
                none,
                True,
            )


# Data sources


def test_a_folder_has_groups_and_unseen_held_out_captions(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [line | {"group": "fruit" if number < 2 else "rest"} for number, line in enumerate(lines)]
    lines[-1]["text"] = ["a red apple never seen", lines[0]["text"][0]]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = load_corpus(DataSpec(source=str(folder)), 32)
    assert read.groups == ["fruit", "fruit", "rest", "rest", "rest"]
    assert read.held_out == [("a red apple never seen", "rest")]
    lines[3]["group"] = 3
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(BadData, match=r"metadata\.jsonl:4: group 3 must be a string"):
        load_corpus(DataSpec(source=str(folder)), 32)


def test_emoji_have_their_categories() -> None:
    read = load_corpus(DataSpec(source="emoji"), 64)
    assert read.groups is not None and len(read.groups) == len(read.rows)
    assert {"flags", "food & drink"} <= set(read.groups)
    assert read.held_out and not {text for text, _ in read.held_out} & set(read.captions)


def test_batches_of_a_part_hold_its_own_captions_and_the_workspace_all(tmp_path: Path) -> None:
    model = StableDiffusion.load(tiny_pipeline(tmp_path / "base"))
    whole = load_corpus(DataSpec(source=str(picture_folder(tmp_path / "data"))), 32)
    found = make_partition(spec(), whole, model.embed_prompts, with_pictures=True)
    encoded = model.encode_prompts(whole.captions)["encoder_hidden_states"]

    def drawn(feed: Feed) -> set[int]:
        rows = torch.cat([feed.batch(number).cond["encoder_hidden_states"] for number in range(10)])
        return {int((encoded - row).square().sum((1, 2)).argmin()) for row in rows}

    seen = []
    for part in (0, 1):
        own = part_of(whole, found, part, with_pictures=True)
        feed = Feed(own, model, device=torch.device("cpu"), batch_size=4, seed=0, with_pictures=True)
        assert feed.prompts == len(whole.captions), "what a regression's teacher pairs are drawn from is shared"
        seen.append(drawn(feed))
        assert seen[part] == set((found.labels == part).nonzero()[:, 0].tolist())
    assert seen[0] & seen[1] == set() and len(seen[0] | seen[1]) == len(whole.captions)
