"""Phrases in the prompts of text encoders other than CLIP: the host's own tokenizers, encoders without weights."""

import io
from functools import cache, partial
from pathlib import Path

import comfy.text_encoders
import pytest
import sentencepiece
import torch
from comfy.text_encoders.hunyuan_image import HunyuanImageTEModel
from comfy.text_encoders.hunyuan_video import HunyuanVideo15Tokenizer, HunyuanVideoClipModel, HunyuanVideoTokenizer
from comfy.text_encoders.kandinsky5 import Kandinsky5TEModel, Kandinsky5Tokenizer
from comfy.text_encoders.lt import LTXAVGemmaTokenizer, LTXAVTEModel, LTXVT5Tokenizer
from spacetime_edit.core.regions import EVERY, Region
from spacetime_edit.host.region_prompt import LAYOUT, encode_regional_prompt, positions_in
from transformers import PreTrainedTokenizerFast

LLAMA = Path(comfy.text_encoders.hunyuan_video.__file__).parent / "llama_tokenizer"


class Numbers(torch.nn.Module):
    """Instead of an encoder: each token's own number as its vector."""

    def encode_token_weights(self, chunks):
        vectors = torch.tensor([[[float(token[0])] for token in chunk] for chunk in chunks])
        return vectors, None, {"attention_mask": torch.ones(vectors.shape[:2])}


class Pooled(torch.nn.Module):
    def encode_token_weights(self, chunks):
        return None, None


class Clip:
    """The host's CLIP, as far as a prompt needs one."""

    def __init__(self, tokenizer, encoder):
        self.tokenizer, self.encoder, self.tokenizer_options = tokenizer, encoder, {}
        self.cond_stage_model = getattr(encoder, "__self__", None)

    def tokenize(self, text, return_word_ids=False):
        return self.tokenizer.tokenize_with_weights(text, return_word_ids)

    def encode_from_tokens_scheduled(self, tokens):
        return [[self.encoder(tokens)[0], {}]]


def hunyuan_video(as_the_file_says=True):
    model = torch.nn.Module()
    model.llama, model.clip_l = Numbers(), Pooled()
    tokenizer = HunyuanVideoTokenizer()
    if as_the_file_says:  # transformers 5 reads it by the rules of LLaMA 2, which drop spaces
        tokenizer.llama.tokenizer = PreTrainedTokenizerFast.from_pretrained(LLAMA)
    return Clip(tokenizer, lambda tokens: HunyuanVideoClipModel.encode_token_weights(model, tokens))


def kandinsky():
    model = Kandinsky5TEModel.__new__(Kandinsky5TEModel)
    torch.nn.Module.__init__(model)
    model.clip_name, model.clip, model.qwen25_7b, model.clip_l = "qwen25_7b", "qwen25_7b", Numbers(), Pooled()
    return Clip(Kandinsky5Tokenizer(), model.encode_token_weights)


def hunyuan_video_15():
    model = HunyuanImageTEModel.__new__(HunyuanImageTEModel)
    torch.nn.Module.__init__(model)
    model.clip_name, model.clip, model.qwen25_7b = "qwen25_7b", "qwen25_7b", Numbers()
    model.byt5_small = Numbers()
    return Clip(HunyuanVideo15Tokenizer(), model.encode_token_weights)


TEXTS = [
    "a red circle beside a green square, on gray, red circles everywhere (a swan on a lake of very clear water)",
    'a snowball and a ball, Red, the words "red ball" on a wall; and an old boat: 1.2 Boat boats user squirrel',
]


@cache
def gemma_words():
    """A vocabulary by Gemma's rules: spaces belong to the words behind them, and none is put in front of a text."""
    made = io.BytesIO()
    rules = dict(add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    texts = iter([text[k:] for text in TEXTS for k in range(0, len(text), 5)] * 3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=made, vocab_size=110, model_type="bpe", minloglevel=2, **rules
    )
    return torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)


class GemmaNumbers(torch.nn.Module):
    """In the place of Gemma 3 with its 49 layers: the tokens' numbers, and which of them are no padding."""

    def encode_token_weights(self, chunks):
        self.numbers = torch.tensor([[float(token[0]) for token in chunk] for chunk in chunks])
        mask = (self.numbers != 0).long()
        return self.numbers[:, None, :, None].expand(-1, 49, -1, 3840 // 1920), None, {"attention_mask": mask}


def ltx2(projection="dual_linear", compat=False):
    """LTX-2's text encoder around that; compat: of its first files, which prepares prompts itself."""
    model = LTXAVTEModel.__new__(LTXAVTEModel)
    torch.nn.Module.__init__(model)
    model.gemma3_12b, model.execution_device = GemmaNumbers(), torch.device("cpu")
    model.compat_mode, model.text_projection_type = compat, projection

    def numbers(vectors):
        """Undoes what the encoder has done to them."""
        return model.gemma3_12b.numbers[:, -vectors.shape[1 if projection == "single_linear" else 2] :, None]

    def with_registers(vectors):
        return torch.nn.functional.pad(vectors, (0, 0, 0, 1024 - vectors.shape[1]), value=-1.0), None

    model.text_embedding_projection = numbers
    model.video_embeddings_connector = model.audio_embeddings_connector = with_registers
    return Clip(LTXAVGemmaTokenizer(tokenizer_data={"spiece_model": gemma_words()}), model.encode_token_weights)


def encoded(*arguments, **options):
    """(conditioning, the layout that it carries)."""
    conditioning = encode_regional_prompt(*arguments, **options)
    return conditioning, conditioning[0][1][LAYOUT]


ENCODERS = {
    "HunyuanVideo": hunyuan_video,
    "HunyuanVideo 1.5": hunyuan_video_15,
    "Kandinsky 5": kandinsky,
    "LTX-2": partial(ltx2, "single_linear", compat=True),
    "LTX-2.3": ltx2,
}
MASK = torch.ones(1, 8, 8)


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request):
    return ENCODERS[request.param]()


def shown(clip, conditioning, places):
    """The text whose vectors stand at these places."""
    names = ("llama", "qwen25_7b", "gemma3_12b")
    tokenizer = next(getattr(clip.tokenizer, name) for name in names if hasattr(clip.tokenizer, name))
    return tokenizer.tokenizer.decode(conditioning[0][0][0, list(places), 0].long().tolist()).strip()


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("a red circle beside a green square, on gray", "red circle"),
        ("a red circle beside a green square, on gray", "green square"),
        ("Red circles everywhere", "red circles"),
        ("red", "red"),
        ("a snowball and a ball", "ball"),
        ('the words "red ball" on a wall', "red ball"),
        ("(a swan:1.2) on a lake " + "of very clear water " * 30 + "and an old boat", "an old boat"),
    ],
)
def test_the_vectors_of_a_phrase_are_its_words(clip, prompt, phrase):
    conditioning, layout = encoded(clip, prompt, [Region(phrase, MASK)])
    assert layout.length == conditioning[0][0].shape[1]
    assert shown(clip, conditioning, layout.positions[0]).lower() == phrase
    assert positions_in(layout, phrase) == list(layout.positions[0])


def test_a_word_inside_another_is_not_it(clip):
    _, layout = encoded(clip, "a ball", [Region(" ball ", MASK)])
    assert len(layout.positions[0]) == 1
    with pytest.raises(ValueError, match="phrase 'ball' in the prompt 'a snowball': it is not there"):
        encode_regional_prompt(clip, "a snowball", [Region("ball", MASK)])


def test_a_capital_letter_is_another_word_where_both_are_there(clip):
    prompt = "Boat beside a boat"
    conditioning, layout = encoded(clip, prompt, [Region("boat", MASK), Region("Boat", MASK)])
    assert [shown(clip, conditioning, places) for places in layout.positions] == ["boat", "Boat"]


def test_every_place_of_a_phrase_counts(clip):
    prompt = "boat and boat, a boat"
    conditioning, layout = encoded(clip, prompt, [Region("boat", MASK, EVERY)])
    assert shown(clip, conditioning, layout.positions[0]) == "boat boat boat"


def test_words_of_the_template_are_no_words_of_the_prompt(clip):
    with pytest.raises(ValueError, match="phrase 'user' in the prompt 'a boat': it is not there"):
        encode_regional_prompt(clip, "a boat", [Region("user", MASK)])


def test_a_prompt_without_regions_is_plain(clip):
    conditioning, layout = encoded(clip, "a boat", [])
    assert torch.equal(conditioning[0][0], clip.encode_from_tokens_scheduled(clip.tokenize("a boat"))[0][0])
    assert layout.positions == ()


def test_without_phrases_nothing_is_refused(clip):
    for regions in ([], [Region("", MASK)]):
        _, layout = encoded(clip, "a boat", regions, "released", splice=True)
        assert layout.positions == ((),) * len(regions)


def test_a_tokenizer_that_loses_spaces_is_named():
    """ComfyUI's of HunyuanVideo with transformers 5, as it is."""
    clip = hunyuan_video(as_the_file_says=False)
    tokens = [clip.tokenize(text)["llama"] for text in ("a b", "ab")]
    if tokens[0] != tokens[1]:
        pytest.skip("these transformers read it right")
    with pytest.raises(ValueError, match="clip: its tokenizer loses the spaces .*transformers below 5"):
        encode_regional_prompt(clip, "a red boat", [Region("boat", MASK)])
    assert encoded(clip, "a red boat", [Region("", MASK)])[1].positions == ((),)


def test_phrases_by_themselves_are_refused(clip):
    with pytest.raises(ValueError, match="splice: .*language model.*switch splice off"):
        encode_regional_prompt(clip, "a boat", [Region("boat", MASK)], splice=True)


@pytest.mark.parametrize(
    ("prompt", "lost"), [("(a squirrel:1.2) on a tree", True), ("a squirrel on (a tree:1.2)", False)]
)
@pytest.mark.parametrize("splice", [False, True])
def test_weights_that_phrases_by_themselves_lose_are_named(ltx, caplog, splice, prompt, lost):
    encoded(ltx, prompt, [Region("squirrel", MASK)], splice=splice)
    assert ("weights of 'squirrel' in the prompt do nothing" in caplog.text) == (lost and splice)


@pytest.fixture(scope="module")
def ltx():
    return Clip(LTXVT5Tokenizer(), lambda tokens: Numbers().encode_token_weights(tokens["t5xxl"]))


def of_t5(clip, conditioning, places):
    tokenizer = getattr(clip.tokenizer, clip.tokenizer.clip).tokenizer
    return tokenizer.decode(conditioning[0][0][0, list(places), 0].long().tolist())


@pytest.mark.parametrize("splice", [False, True])
@pytest.mark.parametrize("prompt", ["Squirrel on a tree", "a tree with a squirrel", "(a squirrel:1.2) on a tree"])
def test_phrases_of_t5(ltx, prompt, splice):
    """Also where the first letter is another than in the prompt, and so the tokens, one by one."""
    conditioning, layout = encoded(ltx, prompt, [Region("squirrel", MASK)], splice=splice)
    assert of_t5(ltx, conditioning, layout.positions[0]).lower() == "squirrel"


def test_of_two_capitalisations_t5_takes_the_one_that_is_asked_for(ltx):
    conditioning, layout = encoded(ltx, "A boat beside a boat", [Region("a boat", MASK)])
    assert of_t5(ltx, conditioning, layout.positions[0]) == "a boat" and min(layout.positions[0]) > 2
