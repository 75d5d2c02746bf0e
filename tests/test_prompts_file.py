"""Prompt files in the formats of ESD and I2P."""

import csv

import pytest

from barrier_diffusers.data.prompt_files import PromptRow, PromptsConfig, read_prompts, write_prompts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_esd_format(tmp_path):
    path = write(
        tmp_path / "esd.csv",
        ",case_number,prompt,evaluation_seed,class\n0,0,an image of a church,4068,church\n"
        '1,7,"a tench, held",1325,tench\n',
    )
    assert read_prompts(path, label_column="class") == [
        PromptRow("0", "an image of a church", 4068, None, "church"),
        PromptRow("7", "a tench, held", 1325, None, "tench"),
    ]
    assert read_prompts(path)[1].label is None
    assert read_prompts(path)[1].image_names(2) == ["7_0.png", "7_1.png"]


def test_i2p_format_with_guidance_and_line_breaks(tmp_path):
    path = write(
        tmp_path / "i2p.csv",
        "\ufeffprompt,categories,hard,sd_seed,sd_guidance_scale,sd_image_width,case_number\n"
        '"first line\nsecond line",hate,0,2048,7,512,11\n"a dog",hate,0,5.0,,512,12\n',
    )
    assert read_prompts(path) == [
        PromptRow("11", "first line\nsecond line", 2048, 7.0),
        PromptRow("12", "a dog", 5, None),
    ]
    renamed = write(tmp_path / "mace.csv", "case_number,prompt,evaluation_seed,evaluation_guidance\n3,a dog,5,7.5\n")
    assert read_prompts(renamed) == [PromptRow("3", "a dog", 5, 7.5)]


def test_prompts_alone_are_numbered(tmp_path):
    rows = read_prompts(write(tmp_path / "p.csv", "prompt\na dog\na cat\n"), first_seed=100)
    assert rows == [PromptRow("0", "a dog", 100), PromptRow("1", "a cat", 101)]


def test_round_trip(tmp_path):
    rows = [PromptRow("a-1", 'with "quotes",\nand lines', 3, 7.25, "dog"), PromptRow("2", "plain", 2**40)]
    write_prompts(tmp_path / "p.csv", rows)
    assert read_prompts(tmp_path / "p.csv") == rows
    with (tmp_path / "p.csv").open(newline="") as file:
        assert next(csv.reader(file))[:3] == ["case_number", "prompt", "evaluation_seed"]


BAD = {
    "no prompt column": ("case_number,text\n0,a\n", "no column 'prompt'; it has case_number, text"),
    "empty file": ("", "no column 'prompt'"),
    "no rows": ("prompt\n", "has no rows"),
    "empty prompt": ("case_number,prompt\n0,a\n1, \n", "line 3: the prompt is empty"),
    "short row": ("case_number,prompt\n0,a\n1\n", "line 3: the prompt is empty"),
    "taken": ("case_number,prompt\n0,a\n0,b\n", "line 3: case_number '0' is taken"),
    "path": ("case_number,prompt\n../a,b\n", "line 2: case_number '../a' is no file name"),
    "seed": ("prompt,evaluation_seed\na,x\n", "line 2: evaluation_seed is 'x', but must be a whole number"),
    "fraction": ("prompt,evaluation_seed\na,1.5\n", "evaluation_seed is '1.5', but must be a whole number"),
    "no seed": ("prompt,evaluation_seed\na,\n", "evaluation_seed is ''"),
    "negative": ("prompt,sd_seed\na,-1\n", "sd_seed is '-1'"),
    "unquoted comma": ("case_number,prompt\n0,a red boot, on a chair\n", "p.csv', line 2: more cells than columns"),
    "unquoted comma, alone": ("prompt\na dog\na cat, red\n", "line 3: more cells than columns"),
    "a comma that shifts seeds": (
        "case_number,prompt,evaluation_seed\n0,a boot, red,7\n",
        "line 2: more cells than columns; text with a comma stands in double quotes",
    ),
    "a cell too few": ("case_number,prompt,evaluation_seed\n0,a boot\n", "line 2: fewer cells than columns"),
    "open quote": ('prompt\n"a boot\na bag\n', "line 2: a quote is never closed"),
    "text after a quote": ('prompt\n"a" boot\n', "p.csv', line 2: ',' expected after '\"'"),
    "open quote among the names": ('case_number,"prompt\n', "p.csv', line 1: unexpected end of data"),
    "a very long cell": ("prompt\n" + "a" * 200_000 + "\n", "line 2: field larger than field limit"),
    "a column twice": ("prompt,prompt\na,b\n", "p.csv' has two columns 'prompt'"),
    "a seed that no generator takes": (
        "prompt,evaluation_seed\na,9223372036854775808\n",
        "must be a whole number that is not negative and below 2^63",
    ),
    "guidance": ("prompt,evaluation_guidance\na,nan\n", "evaluation_guidance is 'nan', but must be a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_name_the_line(name, tmp_path):
    text, message = BAD[name]
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path / "p.csv", text))
    assert message in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_another_encoding_is_refused_with_the_files_name(encoding, tmp_path):
    (tmp_path / "p.csv").write_bytes("prompt\nun café\n".encode(encoding))
    with pytest.raises(ValueError, match=r"p.csv' is not in UTF-8 \(invalid .* at byte \d+\): save it in UTF-8"):
        read_prompts(tmp_path / "p.csv")


def test_seeds_are_read_to_the_last_digit(tmp_path):
    seeds = {"1234567890123456789": 1234567890123456789, "9007199254740993": 9007199254740993, "7.0": 7, "1e3": 1000}
    text = "prompt,evaluation_seed\n" + "".join(f"a,{seed}\n" for seed in seeds)
    assert [row.seed for row in read_prompts(write(tmp_path / "p.csv", text))] == list(seeds.values())


def test_a_line_separator_is_no_new_row(tmp_path):
    assert [row.prompt for row in read_prompts(write(tmp_path / "p.csv", "prompt\na\u2028b\nc\n"))] == [
        "a\u2028b",
        "c",
    ]


def test_missing_files_and_settings(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="does not exist"):
        PromptsConfig(file=str(tmp_path / "none.csv"))
    with pytest.raises(ValueError, match="images_per_prompt is 0"):
        PromptsConfig(images_per_prompt=0)
