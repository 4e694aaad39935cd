"""What the two notes in each template say, by the template's key."""

from __future__ import annotations

from template_settings import (
    COG,
    COGVIDEOX_URL,
    COMPARED_LAMBDAS,
    COSMOS,
    DDS_FRAMES,
    DEPTH_MODEL,
    DEPTH_NET,
    HUNYUAN,
    HUNYUAN15,
    KANDINSKY,
    LAVIE,
    LAVIE_FRAMES,
    LAVIE_SIDE,
    LAVIE_URL,
    LONG_FRAMES,
    LONG_WINDOW,
    LTX,
    LTX2,
    MOCHI,
    MOTION,
    PARTS_TRACKED,
    SAM3,
    SD15,
    SD15_FRAMES,
    SD15_SIDE,
    SD15_TRACKED,
    SHOW1,
    SHOW1_URL,
    TINY_LAMBDA,
    WAN,
    WAN_HIGH,
    WAN_LOW,
    WAN_PERCENT,
    ZEROSCOPE,
    ZEROSCOPE_FRAMES,
    ZEROSCOPE_SIDE,
    ZEROSCOPE_URL,
    Transformer,
)

NOTHING_NEEDED = "No download, no GPU."
SD15_FILES = f"""**Download** by the frontend's own offer, or to `ComfyUI/models/`: `checkpoints/{SD15}` (or a \
finetune of SD 1.5), `controlnet/{DEPTH_NET}`, `geometry_estimation/{DEPTH_MODEL}`"""
SD15_SIZE = f"""**Fit Clip to Model** takes the first {SD15_FRAMES} frames and scales the longest side to {SD15_SIDE}: \
what the method was published with. **Inflate Attention to Video** lets the frames see one another, in the inversion \
and in the edit."""


def offered(kind: Transformer) -> str:
    """What the template offers for download."""
    with_vae = "with its VAE, and the text encoder" if kind.vae is None else "text encoder and VAE"
    return f"`{kind.network.directory}/{kind.network.name}`, {with_vae}"


def fitted(kind: Transformer) -> str:
    return f"""**Fit Clip to Model** takes the first {kind.frames} frames (always {kind.step} n + 1) and scales the \
longest side to {kind.side}."""


def matched(kind: Transformer, more: str = "") -> str:
    """About STR-Match on a transformer."""
    return f"""## STR-Match on {kind.title}
A transformer whose attention sees all frames at once; the score takes it from the first two blocks. The template \
offers the files: {offered(kind)}. Press **R**, choose your clip, write what it shows and what it should show, and \
run. *Predict Cost* says first how long it will take: cancel if that is too long.

{fitted(kind)}{more}"""


def regions_of(kind: Transformer, more: str = "") -> str:
    """About ST-Layout by boxes on a transformer."""
    return f"""## Regions on {kind.title}
Each phrase of the prompt stays in its region, without a word on which is where in the prompt. The template offers the \
files: {offered(kind)}. Press **R**, choose your clip and write its prompt.

1. **Mask from Boxes** holds one line a key frame, *frame: x, y, width, height*; between them the box moves.
2. Each **Region Prompt** ties a phrase to its mask; *Preview Regions* shows both over the clip.
3. **ST-Layout Attention Patch** goes on the model; outside the regions the clip stays.

{fitted(kind)}{more}"""


SOUND = "The picture alone is edited; the film keeps the sound of the clip."

ABOUT = {
    "prompt_swap": f"""## Prompt swap
Press **Run**: the red circle becomes a square. {NOTHING_NEEDED}

1. **Invert Video** runs the model backwards from the clip to noise.
2. **Sample from Trajectory** runs it forwards again, with a new prompt.

Nothing ties the edit to the clip but the noise that it starts from: motion and background may drift. That is what the \
*STR-Match* templates cure.""",
    "str_match": f"""## STR-Match
Press **Run**: the red circle becomes a square. {NOTHING_NEEDED}

1. **Invert Video** runs the model backwards from the clip to noise.
2. **Capture STR Score** chooses what to keep: which pixel is related to which, from frame to frame.
3. **STR Latent Optimizer** runs forwards with a new prompt and pulls every step towards those relations.

**STR Cosine Curve** shows how well they match at each step: less while the new prompt takes hold, then more.""",
    "str_match_mask": f"""## STR-Match with a mask
Press **Run**: the red circle becomes a square, and all that lies outside the mask stays as it was. {NOTHING_NEEDED}

White in the mask = edit. **dilation** grows it by a few pixels, so that a larger object has room.""",
    "relevance_mask": f"""## A mask without painting
Press **Run**: the model's own attention finds the circle in every frame, and the edit stays inside that mask. \
{NOTHING_NEEDED}

1. **Preview Relevance** asks what in each frame belongs to one point of the clip.
2. Click another place on its preview and run again: the mask follows what you clicked. The inversion is kept.
3. **STR Latent Optimizer** takes the mask as it would take a painted one.""",
    "several": f"""## Two objects, one after another
Press **Run**: first the left object changes, then the right one. {NOTHING_NEEDED}

1. The first edit has the mask of the left object. Its prompt also says what stays.
2. **Invert Video** inverts the edited *latent*: no decoding between, so nothing is lost in the VAE. Its prompt is \
that of the first edit.
3. The second edit has the mask of the right object. A third would go on in the same way.""",
    "delete": f"""## Delete an object
Press **Run**: the red circle on the right goes, the blue one stays. {NOTHING_NEEDED}

The mask says what goes, the prompt says **what remains**. With **task** *delete* the inside of the mask begins from \
new noise, by the seed of *RandomNoise*, and nothing in there is matched; with *change* the match holds the number of \
objects, and a second blue circle may take the place of the red one.""",
    "layout_video": f"""## Object and background at once
Press **Run**: the red circle becomes a blue square, the gray background white. {NOTHING_NEEDED}

1. *A layout video* has a flat colour for each region: here it is made from the clip's mask; it may as well come from \
a segmentation model or a paint program.
2. **Regions from Masks** makes a region of each colour, one a line of its phrases, the largest area first.
3. **ST-Layout Attention Patch** keeps both phrases in their place, **STR Latent Optimizer** the motion: two methods \
in one pass. Since everything changes, **lambda** is 0.5 with two **iterations**: more leaves blotches.""",
    "regions": f"""## Two objects become two others
Press **Run**: the left object becomes a yellow square, the right one a blue circle. {NOTHING_NEEDED}

The prompt says it **the other way round**; the masks decide.

1. **Region Prompt** ties words of the prompt to a mask, once for each object.
2. **Encode Regional Prompt** finds these words in the prompt.
3. **ST-Layout Attention Patch** draws them into their regions while the model samples. What lies in no region is kept \
by the mask of *Preview Regions*.""",
    "identities": f"""## Two objects trade places
Press **Run**: the red circle becomes a green square, the green square a red circle. {NOTHING_NEEDED}

The prompt is that of the clip, word for word. Only the **Region Prompts** say that each phrase belongs where the \
other object is.""",
    "equal": f"""## One of two equal objects
Press **Run**: one of the two cyan circles becomes red, the other stays. {NOTHING_NEEDED}

Words cannot say which: both answer to *a cyan circle*, and the prompt names no place. Each **Region Prompt** has the \
mask of one circle, so each phrase has its own.""",
    "part": f"""## Part of an object
Press **Run**: the black stripe of the square becomes white, the square stays. {NOTHING_NEEDED}

1. One **Region Prompt** has the mask of the whole square, the other that of its stripe. Where the two overlap, a part \
lies before its whole.
2. **ST-Layout Attention Patch** keeps each phrase in its region.
3. **Sample from Trajectory** has the stripe's mask too: all around it is kept.""",
    "one_class": f"""## All objects of a kind
Press **Run**: both objects become yellow triangles, by one mask and one phrase. {NOTHING_NEEDED}

1. *Both objects* adds their masks; a segmentation of the whole class would do as well.
2. The phrase stands in the prompt twice: **occurrence** *every* takes both.""",
    "background": f"""## Only the background
Press **Run**: the gray background becomes white, the circle stays. {NOTHING_NEEDED}

The region is all that the object is not (*Around the object*). Its mask also goes to **Sample from Trajectory**, so \
that nothing inside the object is touched.""",
    "from_attention": f"""## Regions without masks
Press **Run**: the left object becomes a yellow square, the right one a blue circle, and nobody painted a mask. \
{NOTHING_NEEDED}

**Regions from Attention** asks the model which pixels of all frames belong together, and numbers the regions from the \
largest. Each line of its **phrases** belongs to one number; the first line is empty, because number 1 is the \
background.""",
    "dds": f"""## DreamMotion
Press **Run**: the red circle becomes a blue one, by optimising the clip itself. {NOTHING_NEEDED}

1. Nothing is inverted and nothing is sampled: **Video DDS Optimize** begins with the latent of the clip.
2. Each step asks what the model says of the clip with the first prompt and of the edit with the second; the \
difference moves the edit. **s_ssm** and **t_ssm** hold layout and motion.

Watch the preview in the node: the colour changes bit by bit. This tiny model is done after 32 steps of size 1.6; real \
ones want 200 of 0.4.""",
    "dds_mask": f"""## DreamMotion inside a box
Press **Run**: the red circle becomes a blue one, and the prompt changes nothing outside the box. {NOTHING_NEEDED}

**Mask from Boxes** has a box for the first and for the last frame; between them it moves evenly.""",
    "dds_polish": f"""## DreamMotion, then STR-Match
Press **Run**: two methods, one after the other. {NOTHING_NEEDED}

1. **Video DDS Optimize** changes the colour in few steps; edges are left a little worn.
2. The result is inverted with the prompt of the edit, and the later half of the steps is sampled again. **STR Latent \
Optimizer** holds every place while the model draws clean edges.""",
    "dds_zeroscope": f"""## DreamMotion on Zeroscope
**Download** all of [{ZEROSCOPE}]({ZEROSCOPE_URL}) in diffusers layout (folders `unet`, `vae`, `text_encoder`, \
`tokenizer`) to

`ComfyUI/models/diffusers/{ZEROSCOPE}`

and press **R** to refresh. Then choose your clip, write what it shows and what it should show, and run.

{DDS_FRAMES} frames: each step takes four passes of the model and a backward pass, so more frames take long. With 200 \
steps it is as much work as some 500 steps of sampling with CFG.""",
    "dds_show1": f"""## DreamMotion on pixels
Show-1 draws key frames of 64 x 40 pixels without a VAE. **Video DDS Optimize** edits those pixels; Zeroscope then \
draws them large.

**Download** all of [{SHOW1}]({SHOW1_URL}) (its text encoder is T5-XXL, 9 GB in half precision) and of \
[{ZEROSCOPE}]({ZEROSCOPE_URL}) into `ComfyUI/models/diffusers`, and press **R** to refresh. Then choose your clip, \
write what it shows and what it should show, and run.

The method's authors edit {DDS_FRAMES} key frames of 2 frames a second, and have Show-1 draw the frames between. That \
stage is not part of the pack; a frame interpolation node can take its place.""",
    "sd15": f"""## Several objects on SD 1.5
{SD15_FILES}. Press **R**, choose your clip, write what it shows and what it shall show, and run.

1. **Regions from Attention** shows numbered regions. Write the phrases of the new prompt on the lines of their \
numbers and run again: the inversion is kept.
2. **ST-Layout Attention Patch** keeps each phrase in its region.

{SD15_SIZE}""",
    "sd15_sam3": f"""## Several objects on SD 1.5, by SAM3
{SD15_FILES}, `checkpoints/{SAM3}`. Press **R**, choose your clip, write what it shows and what it shall show, and run.

1. *What to track*: each thing and how many of it, such as `{SD15_TRACKED}`. **Regions from Masks** ties a line of \
phrases to each, in that order; *Preview Regions* shows whether it is the right one.
2. **ST-Layout Attention Patch** keeps each phrase in its region.

{SD15_SIZE}""",
    "sd15_parts": f"""## Parts of an object on SD 1.5
{SD15_FILES}, `checkpoints/{SAM3}`. Press **R**, choose your clip, write what it shows and what it shall show, and run.

1. *What to track*: the parts, such as `{PARTS_TRACKED}`. **Regions from Masks** ties a line of phrases to each, in \
that order.
2. **ST-Layout Attention Patch** keeps each phrase in its part: the rest of the man and the background stay as they \
are, by the mask.

{SD15_SIZE}""",
    "add": f"""## Add an object
Press **Run**: a green square joins the blue circle. {NOTHING_NEEDED}

The mask says where the object comes: here one that moves, for an object that moves. The prompt says all that there \
will be. With **task** *add* the inside of the mask begins from new noise, by the seed of *RandomNoise*, and nothing \
in there is matched.

(The clip has two objects; the red one is painted over before the inversion.)""",
    "compare_lambdas": f"""## Compare lambdas
Press **Run**: one film shows the clip and four edits of it. {NOTHING_NEEDED}

1. **Sweep Lambda** makes a sampler for each value.
2. All that follows runs once for each, in order, up to *Two by two*, which sets the films side by side.

Left to right, top to bottom: {COMPARED_LAMBDAS}. 0 is the plain prompt swap, which loses the way of the circle; \
at 1 each move goes all the way to a match, as far as can be foreseen.""",
    "measured": f"""## Measure an edit
Press **Run**: the circle becomes a square, and **Video Edit Metrics** says in numbers how steady it is, how well it \
moves as the clip does and what of the background is left. {NOTHING_NEEDED}

What it cannot measure says what to connect: with CLIP, CLIP Vision and RAFT of your own the table is complete.""",
    "one_block": f"""## One block
Press **Run**: the red circle becomes a square. {NOTHING_NEEDED}

All of STR-Match is in the block **Edit Video (STR-Match)**: a model, a clip and two prompts go in, the edit comes \
out. Find it, and *Edit Regions (ST-Layout)* and *Edit Video (DreamMotion)*, in the node library under *Subgraph \
Blueprints*, or by searching for *Edit Video*. Its corner opens it: inside are the nodes of the other templates.""",
    "checked": f"""## Check your model
Press **Run**: **Check Model** tries inversion, attention, the gradient of STR-Match, regions and memory, and says how \
each went. {NOTHING_NEEDED}

For a model of yours: put its loader, text encoder and VAE in the place of the tiny one's, and your clip (behind *Fit \
Clip to Model*) in the place of the example. The JSON holds no prompt and no file name.""",
    "compared": f"""## Compare edits
Press **Run**: one clip is edited twice, by a prompt swap and by STR-Match, and **Compare Edits** says which is better \
at what. {NOTHING_NEEDED}

1. The table has a column for each edit; the best of each row is bold. **chart** shows the same as bars.
2. In **slider** a line sweeps over each edit; left of it is the clip.
3. **Optical Flow** is computed once for all edits. **Track Points** shows where points of the object go.""",
    "save_and_load": f"""## Save and load a trajectory
Press **Run**: the circle becomes a square, and *Save Trajectory* keeps the inversion in a file. {NOTHING_NEEDED}

To edit from the file, on another day:
1. Press **R**, so that *Load Trajectory* lists it, and choose it there.
2. Right-click the title of the group *Another day*: *Set Group Nodes to Always*.
3. Right-click that of the group *Today*: *Set Group Nodes to Never*. Run: nothing is inverted.""",
    "lavie": f"""## STR-Match on LaVie
The model that the method's authors used most. The template offers to download [{LAVIE}]({LAVIE_URL}) to \
`ComfyUI/models/diffusion_models`, and a Stable Diffusion 1.5 checkpoint for CLIP and VAE. Press **R**, choose your \
clip, write what it shows and what it should show, and run. *Predict Cost* says first how long it will take: cancel if \
that is too long.

**Fit Clip to Model** takes the first {LAVIE_FRAMES} frames and scales the longest side to {LAVIE_SIDE}. A clip of 24 \
frames a second moves little in so few: set **every_nth** to 3.""",
    "wan": matched(WAN, " The 14B fits the same graph."),
    "hunyuan": matched(HUNYUAN, " **cfg** stays 1: the model was made to follow the prompt by itself."),
    "hunyuan15": matched(HUNYUAN15),
    "ltx": matched(LTX, " The smallest and fastest of these models."),
    "ltx2": matched(LTX2, f" {SOUND}"),
    "mochi": matched(MOCHI),
    "cosmos": matched(COSMOS, " Made to go on from a picture; here it gets the whole clip."),
    "kandinsky": matched(KANDINSKY),
    "wan22": f"""## STR-Match on Wan 2.2
Two models share the denoising: one works at high noise, one at low noise. The template offers both \
(`{WAN_HIGH.network.name}`, `{WAN_LOW.network.name}`), text encoder and VAE.

1. The inversion goes up: **Low noise** inverts the clip to where the other takes over (**to_percent** \
{WAN_PERCENT:g}), **High noise** goes on from there to pure noise.
2. The edit goes down: first with the model of high noise, then, with **continue_from_latent**, with the other.

{fitted(WAN_HIGH)} The models are 14 GB each, one of them at a time in memory.""",
    "long_clip": f"""## STR-Match on a long clip
The model sees {LONG_WINDOW["context_length"]} frames at a time: *Wan Context Windows* goes before the inversion and \
before the edit, and the score is matched window by window, in the memory of one. Where windows overlap they are \
blended. The template offers {offered(WAN)}.

**Fit Clip to Model** takes the first {LONG_FRAMES} frames. A schedule that moves its windows from step to step \
(*uniform*) hides seams better when a clip is made anew; for an inversion that shall return to the clip take \
*standard_static*.""",
    "wan_regions": regions_of(WAN),
    "ltx_regions": regions_of(LTX),
    "ltx2_regions": regions_of(LTX2, f" {SOUND}"),
    "cogvideox": f"""## STR-Match on CogVideoX
A transformer whose attention sees all frames at once; the score takes it from the first two blocks, as the paper \
does. **Download** the two files of [the folder transformer]({COGVIDEOX_URL.replace("/resolve/", "/tree/")}) of \
CogVideoX-5b to

`ComfyUI/models/diffusion_models/CogVideoX-5b`

The template offers the text encoder and the VAE. Press **R**, choose your clip, write what it shows and what it \
should show, and run. *Predict Cost* says first how long it will take: cancel if that is too long.

{fitted(COG)} A clip of 24 frames a second moves little in so few: set **every_nth** to 3.""",
    "animatediff": f"""## STR-Match on AnimateDiff
Stable Diffusion 1.5, or a finetune of it, with a motion model. Install **AnimateDiff-Evolved** with ComfyUI Manager; \
the template offers `checkpoints/{SD15}` and `animatediff_models/{MOTION}`. Press **R**, choose your clip, write what \
it shows and what it should show, and run. *Predict Cost* says first how long it will take: cancel if that is too long.

**Fit Clip to Model** takes the first {SD15_FRAMES} frames, which motion models are made for, and scales the longest \
side to {SD15_SIDE}. Inversion and edit get the same model from *Use Evolved Sampling*.""",
    "animatediff_regions": f"""## Regions on AnimateDiff
Each phrase of the prompt stays in its region. Install **AnimateDiff-Evolved** with ComfyUI Manager; the template \
offers `checkpoints/{SD15}` and `animatediff_models/{MOTION}`. Press **R**, choose your clip and write its prompt.

1. **Mask from Boxes** holds one line a key frame, *frame: x, y, width, height*; between them the box moves.
2. Each **Region Prompt** ties a phrase to its mask; *Preview Regions* shows both over the clip.
3. **ST-Layout Attention Patch** goes behind *Use Evolved Sampling*; outside the regions the clip stays.""",
    "zeroscope": f"""## STR-Match on Zeroscope
**Download** all of [{ZEROSCOPE}]({ZEROSCOPE_URL}) in diffusers layout (folders `unet`, `vae`, `text_encoder`, \
`tokenizer`) to

`ComfyUI/models/diffusers/{ZEROSCOPE}`

and press **R** to refresh. Then choose your clip, write what it shows and what it should show, and run. *Predict \
Cost* says first how long it will take: cancel if that is too long.

**Fit Clip to Model** takes the first {ZEROSCOPE_FRAMES} frames and scales the longest side to {ZEROSCOPE_SIDE}. A \
clip of 24 frames a second moves little in so few: set **every_nth** to 3.""",
}

TRY_REGIONS = """### Try
- **cross_strength** 1.5 if a phrase does not come; 0 and 0: the prompt alone.
- masks by SAM3 instead of boxes: *Run SAM3 Video Track* and *Regions from Masks*, as in the template for SD 1.5.
- **dilation** of *Sample from Trajectory* larger, if the new object is larger than the old one.
- *STR Latent Optimizer* in place of *Sample from Trajectory*: motion is held too."""


def tried(*more: str) -> str:
    """What to try with STR-Match on a transformer."""
    lines = (
        "**lambda** 0.5 to 1.5. Smaller: more of the prompt. Larger: more of the clip's motion and background.",
        "**steps** 20 in *Invert Video* for a first look, 50 for the result.",
        "**layers** *b0* in *Capture STR Score* if memory is short: one block less to match.",
        *more,
        "a **mask** (white = edit) on *Fit Clip to Model*, from there to *STR Latent Optimizer*: the rest of the "
        "picture stays.",
    )
    return "\n".join(["### Try", *(f"- {line}" for line in lines)])


TRY = {
    "prompt_swap": """### Try
- **edit** 1 and 3 in *Load Example Clip*: other prompts for the same clip.
- another **clip**: 04 to 07 have two objects.
- connect **mask_1** to *Sample from Trajectory*, with **dilation** 4: the background stays.""",
    "str_match": f"""### Try
- **lambda** {TINY_LAMBDA:g} -> 0.5: the prompt counts more; look at the curve too. Larger: motion and background \
stay more. (At 0 there is no match and no curve: that is the template *prompt swap*.)
- **edit** 1 and 3 in *Load Example Clip*: other prompts for the same clip.
- another **clip**: 04 to 07 have two objects.
- **end_percent** 0.5: match only in the first half, which is faster. 1: match to the end, as in the paper.""",
    "str_match_mask": """### Try
- **dilation** 0 and 16: too tight cuts the new shape, too wide lets the background change.
- **edit** 1 in *Load Example Clip*: a new colour. (Edit 3 changes the background, which this mask keeps.)
- **mask_2** with a clip of two objects (04 to 07).
- **lambda** 0: the mask alone.""",
    "relevance_mask": """### Try
- another **clip** (04 to 07 have two objects), then a click on one of them and **edit** 1 to 3.
- **threshold** smaller: the mask grows.
- a click on the background: what belongs to it?""",
    "several": """### Try
- other words for the object in the second prompt; keep the rest of it as in the first.
- **refinements** 0 in the second *Invert Video*: faster, a little less exact.
- both changes in one edit without a mask, as in the template *STR-Match*: quicker, and each disturbs the other.""",
    "delete": """### Try
- **task** *change*, **dilation** 8: a blue circle in place of the red one.
- clip 07 with **mask_1** and the prompt *a yellow circle on a navy background*.
- other clips of two objects (04 to 07): this tiny model often puts a copy of what remains in the place.""",
    "layout_video": """### Try
- Another prompt and the same words in **phrases**: *a green triangle on a pink background*.
- *Preview Regions* shows which line got which region.""",
    "regions": """### Try
- **cross_strength** and **self_strength** 0: the prompt's own order wins.
- Exchange the two phrases in the *Region Prompts*.
- **cross_strength** 1, the method's own: enough for large models, too little for this small one.
- Other words in both places: *a purple square*.""",
    "identities": """### Try
- **cross_strength** and **self_strength** 0: everything stays as it is, the prompt says nothing new.
- Only one of the two **Region Prompts** exchanged: the right one with *a red circle* too.""",
    "equal": """### Try
- exchange the two phrases: the other circle becomes red.
- **cross_strength** and **self_strength** 0: the model itself chooses which.
- clip 10, with *a purple square* and *a green square* on its white background.
- clip 13 has three equal objects: one more **Region Prompt**, with **mask_3**.""",
    "part": """### Try
- the square instead: *a red square with a black stripe* in prompt and phrases, and the mask of *Preview Regions* on \
*Sample from Trajectory*.
- **cross_strength** and **self_strength** 0: the stripe gets ragged.
- **dilation** 0: too tight, the new stripe is uneven.""",
    "one_class": """### Try
- **occurrence** *first*: the second word of the pair has no region of its own.
- another class in prompt and phrase: *a blue square*.""",
    "background": """### Try
- *a red circle on a pink background*, with the phrase *pink background*.
- without the mask on *Sample from Trajectory*: the circle may change a little too.""",
    "from_attention": """### Try
- **phrases** empty: all regions are shown, and the edit has none to go by.
- **kinds** 4 and 5: what else does the model tell apart?
- clips 05 and 06, with two objects of one shape.""",
    "dds": """### Try
- **edit** 2 in *Load Example Clip*: another shape. Self-similarity holds the old one; **s_ssm** 0 lets it go.
- **s_ssm** and **t_ssm** 0: the circle wanders.
- **score** *plain*: score distillation alone, which is what DreamMotion improves on.""",
    "dds_mask": """### Try
- a box that is too small, and one that is too large.
- without the mask.
- **dilation** 4.""",
    "dds_polish": """### Try
- *The later steps* from 5: more is drawn anew. From 15: less.
- **lambda** 0: the same without STR-Match.""",
    "dds_zeroscope": """### Try
- **Mask from Boxes** to **mask**: only what lies in the boxes follows the new prompt.
- **steps** 100 for a first look.
- **s_ssm** 0.1 if nothing changes, 0.6 if too much does.""",
    "dds_show1": """### Try
- **denoise** of *KSampler* 0.3: nearer to the pixels as they were edited. 0.8: as much as Show-1's own last stage.
- any other upscaler in place of *Draw them large*.
- **Mask from Boxes** to **mask**: only what lies in the boxes follows the new prompt.""",
    "sd15": """### Try
- **shared_norms** in *Inflate Attention to Video* if brightness flickers.
- **levels** *2,4,8* there: much faster, details agree less.
- **cross_strength** 1.5 if a phrase does not come.
- a ControlNet for pose in place of depth, if people move.""",
    "sd15_sam3": """### Try
- **detection_threshold** lower, if SAM3 misses something.
- **dilation** of *Sample from Trajectory* larger, if the new object is larger than the old one.
- **levels** *2,4,8* in *Inflate Attention to Video*: much faster, details agree less.
- the background as one more region: a line without a track of its own needs a mask, by *Region Prompt*.""",
    "sd15_parts": """### Try
- a part that SAM3 does not know: paint its mask and add it by *Region Prompt* behind the others; it lies on them.
- **cross_strength** 1.5 if a phrase does not come; small parts need more.
- **dilation** of *Sample from Trajectory* larger, if the new part is larger than the old one.""",
    "add": """### Try
- another seed in *RandomNoise*: another square, now and then one that is missing in a frame.
- **task** *change*: what does the match make of the square?
- other words for the green square in the prompt.
- a mask that stands still: this tiny model then often leaves the place empty.""",
    "compare_lambdas": """### Try
- other values; the film has room for four. For more, enlarge *Two by two*.
- **edit** 2 in *Load Example Clip*: a red square.
- a **mask** on *STR Latent Optimizer*: every edit gets it.""",
    "measured": """### Try
- **lambda** 0 in *STR Latent Optimizer* and run again: which numbers get worse?
- *Load CLIP Vision* and a CLIP of the same model on *Video Edit Metrics*: text alignment, frame consistency, Q-edit.
- *Load Optical Flow Model* (RAFT) on it: a better flow for real clips.""",
    "one_block": """### Try
- **mask_1** of *Load Example Clip* on **mask** of the block: the rest of the picture stays.
- **lambda** 0: a prompt swap.
- a model of your own in its place: then **steps** 50.""",
    "checked": """### Try
- nothing on **latent** and the VAE on **vae**: an example clip at the size of the model.
- all nodes of an edit that came out wrong on **model**: what do they replace?
- **layers** of *Capture STR Score* and **lambda** of *STR Latent Optimizer* connected to it.""",
    "compared": """### Try
- a third edit: connect its *VAE Decode* to the free input of *Compare Edits* and add a line to **names**.
- *Load CLIP Vision* and a CLIP of the same model on it: text alignment, frame consistency, Q-edit.
- *Load Optical Flow Model* (RAFT) on all three: a better flow for real clips.""",
    "save_and_load": """### Try
- the file in another graph: *Load Trajectory* wants the same model and the same prompt of the clip.
- another prompt there: it names what differs, instead of a bad edit.
- *Sample from Trajectory* behind it: a plain prompt swap.""",
    "lavie": """### Try
- **lambda** 0.5 to 1.5. Smaller: more of the prompt. Larger: more of the clip's motion and background.
- **layers** *m0* in *Capture STR Score* if memory is short.
- an SD 1.5 finetune for its CLIP and VAE; LoRAs of SD 1.5 fit the model's spatial layers.
- a **mask** (white = edit) on *Fit Clip to Model*, from there to *STR Latent Optimizer*: the rest of the picture \
stays.""",
    **{key: tried() for key in ("wan", "hunyuan", "hunyuan15", "ltx", "ltx2", "mochi", "cosmos", "kandinsky")},
    "wan22": tried("**to_percent** larger: more of the work for the model of high noise, which decides the layout."),
    "long_clip": tried("a longer **context_overlap**: softer seams, more windows."),
    "wan_regions": TRY_REGIONS,
    "ltx_regions": TRY_REGIONS,
    "ltx2_regions": TRY_REGIONS,
    "cogvideox": tried(
        "**weight_dtype** *fp8_e4m3fn* in *Load CogVideoX*: a quarter of the memory of fp32, and less exact."
    ),
    "animatediff": """### Try
- **lambda** 0.5 to 1.5. Smaller: more of the prompt. Larger: more of the clip's motion and background.
- **layers** *m0* in *Capture STR Score* if memory is short.
- a finetune of SD 1.5 in the style that you want, and its LoRAs.
- a **mask** (white = edit) on *Fit Clip to Model*, from there to *STR Latent Optimizer*: the rest of the picture \
stays.""",
    "animatediff_regions": """### Try
- **cross_strength** 1.5 if a phrase does not come; 0 and 0: the prompt alone.
- **temporal_strength** 1 if an object that moves takes the looks of the region it leaves.
- masks by SAM3 instead of boxes: *Run SAM3 Video Track* and *Regions from Masks*, as in the template for SD 1.5.
- *STR Latent Optimizer* in place of *Sample from Trajectory*: motion is held too.""",
    "zeroscope": """### Try
- **lambda** 0.5 to 1.5. Smaller: more of the prompt. Larger: more of the clip's motion and background.
- **steps** 20 in *Invert Video* for a first look, 50 for the result.
- a **mask** (white = edit) on *Fit Clip to Model*, from there to *STR Latent Optimizer*: the rest of the picture stays.
- Both prompts alike but for the object work best.
- *Load Trajectory* in place of *Invert Video*: go on from the file of the first run.""",
}
