from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import skimage.data
from judge_server import JudgeServer, completion, respond
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from builder_samples import encoded, picture, read, table

from cv_lightning.agent.protocol import call_markup
from cv_lightning.commands.data_build import build_sft as command
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.factory.build_sft import BuildSFT, build_sft
from cv_lightning.factory.endpoint_teacher import TeacherConfig
from cv_lightning.factory.plans import KINDS, PlanConfig
from cv_lightning.factory.teacher import CropFrame
from cv_lightning.factory.verify import Verification, verify_file
from cv_lightning.rewards import JudgeConfig
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.tools import CodeTool, CropBoxTool
from cv_lightning.types import DataError, EndpointError

EQUAL = PlanConfig(shares=dict.fromkeys(KINDS, 1.0))
SMALL_SANDBOX = SandboxConfig(num_zygotes=1)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SMALL_SANDBOX) as started:
        yield started


def build(files: list[str], out: Path, **options: Any) -> dict[str, Any]:
    return build_sft(BuildSFT(files=files, out=out, sandbox=SMALL_SANDBOX, **{"plan": EQUAL, **options}))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 conversations of all kinds."""
    folder = tmp_path_factory.mktemp("built")
    out = folder / "sft.json"
    report = build([table(folder, 40)], out)
    assert report["kept"] == 40 and not report["dropped"], report
    assert {kind: counts["kept"] for kind, counts in report["kinds"].items()} == dict.fromkeys(KINDS, 8)
    return out


def verified(path: Path, sandbox: Sandbox) -> Verification:
    return asyncio.run(verify_file(path, sandbox))


def test_every_kept_conversation_verifies_and_can_be_read(built: Path, sandbox: Sandbox) -> None:
    found = verified(built, sandbox)
    assert (found.verified, found.problems) == (40, {})
    files = ConversationFiles([str(built)], ReaderConfig())
    assert len(files) == 40 and not files.problems.problems
    calls = [sum(turn.call is not None for turn in files.row(at).turns) for at in range(40)]
    assert {0, 1, 2, 3} <= set(calls)


def test_deliberate_errors_can_be_shown_without_loss(tmp_path: Path) -> None:
    plan = PlanConfig(shares={"error_recovery": 1.0})
    build([table(tmp_path, 6)], tmp_path / "sft.json", plan=plan, learn_faults=False)
    items = read(tmp_path / "sft.json")
    assert len(items) == 6
    for item in items:
        said = [turn for turn in item["conversations"] if turn["from"] == "gpt"]
        marked = [turn for turn in said if turn.get("loss") is False]
        assert len(marked) == 1 and said[-1] not in marked, "the fault alone"
        if item["build"]["fault"] == "exception":
            after = item["conversations"][item["conversations"].index(marked[0]) + 1]
            assert after["from"] == "tool" and "<image>" not in after["value"]


def tampered(built: Path, kind: str, change: Any) -> Path:
    """The built file with the first conversation of a kind changed; its images are the same files."""
    items = read(built)
    at = next(i for i, item in enumerate(items) if item["build"]["kind"] == kind)
    change(items[at])
    path = built.with_name("tampered.json")
    path.write_text(json.dumps([items[at]]))
    return path


def _other_answer(item: dict[str, Any]) -> None:
    item["build"]["answer"] = "999"


def _moved_box(item: dict[str, Any]) -> None:
    x1, y1, x2, y2 = item["build"]["box"]
    item["build"]["box"] = [x1 + 15, y1, x2 + 15, y2]


def _not_turned(item: dict[str, Any]) -> None:
    item["build"]["applied"] = []


def _other_code(item: dict[str, Any]) -> None:
    turn = item["conversations"][1]
    turn["value"] = (
        turn["value"].replace("result = ", "result = image.convert('L'); result = ", 1).replace("image.", "image.", 1)
    )
    turn["value"] = turn["value"].replace("image.crop(", "image.rotate(1).crop(")


def _swapped_images(item: dict[str, Any]) -> None:
    item["images"][-1] = item["images"][0]


def _leaking(item: dict[str, Any]) -> None:
    turn = item["conversations"][1]
    turn["value"] = turn["value"].replace("<think>", "<think>According to the ground truth. ")


def _no_thought(item: dict[str, Any]) -> None:
    turn = item["conversations"][1]
    turn["value"] = turn["value"].replace("<think>", "").replace("</think>", "")


def _called_error(item: dict[str, Any]) -> None:
    item["build"]["kind"], item["build"]["fault"] = "error_recovery", "exception"


def _mended_error(item: dict[str, Any]) -> None:
    item["build"]["fault"] = None


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("single_tool", _other_answer, "answer"),
        ("multi_crop", _moved_box, "box outside"),
        ("multi_tool", _not_turned, "orientation"),
        ("multi_crop", _other_code, "other image"),
        ("multi_crop", _swapped_images, "other image"),
        ("no_tool", _leaking, "leak"),
        ("single_tool", _no_thought, "format"),
        ("single_tool", _called_error, "no single error"),
        ("error_recovery", _mended_error, "call failed"),
    ],
)
def test_verification_finds_tampered_claims(
    built: Path, sandbox: Sandbox, kind: str, change: Any, problem: str
) -> None:
    found = verified(tampered(built, kind, change), sandbox)
    assert found.verified == 0
    assert problem in {each.kind for each in found.problems[0]}, found.problems


def test_a_killed_build_resumes(tmp_path: Path) -> None:
    files, whole, cut = [table(tmp_path, 60)], tmp_path / "whole.json", tmp_path / "cut.json"
    build(files, whole)
    arguments = ["data", "build-sft", *files, "--out", str(cut), "--plan.shares", json.dumps(EQUAL.shares)]
    arguments += ["--max_parallel", "1", "--sandbox.num_zygotes", "1"]
    process = subprocess.Popen([sys.executable, "-m", "cv_lightning", *arguments], start_new_session=True)
    progress = tmp_path / "cut.progress.jsonl"
    end = time.monotonic() + 120
    while not progress.exists() or progress.read_bytes().count(b"\n") < 8:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = progress.read_bytes().count(b"\n") - 1
    assert done < 60 and not cut.exists()
    build(files, cut, max_parallel=4)
    assert progress.read_bytes().count(b"\n") == 61
    assert [item["conversations"] for item in read(cut)] == [item["conversations"] for item in read(whole)]
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        build(files, cut, seed=5)


@pytest.mark.parametrize("coordinates", ["model_px", "relative_1000"])
def test_other_frames_of_coordinates_verify_too(tmp_path: Path, sandbox: Sandbox, coordinates: Any) -> None:
    out = tmp_path / "sft.json"
    report = build([table(tmp_path, 20)], out, frame=CropFrame(coordinates=coordinates))
    assert report["kept"] >= 18
    assert verified(out, sandbox).verified == report["kept"]


def test_a_folder_of_images_with_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"coffee": "What drink is in the cup?", "chelsea": "What animal is it?", "page": "What is this a scan of?"}
    lines = []
    for name, question in names.items():
        Image.fromarray(getattr(skimage.data, name)()).save(tmp_path / f"{name}.png")
        lines.append({"image": f"{name}.png", "question": question, "answer": name})
    lines.append({"image": "chelsea.png", "question": "What is at this spot?", "answer": "an eye"})
    lines[-1]["bbox"] = [133, 96, 163, 126]  # type: ignore[assignment]
    lines.append({"image": "none.png", "question": "What?", "answer": "nothing"})
    path = tmp_path / "vqa.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "sft.json"
    assert command([str(path), "--out", str(out), "--count", "25", "--verify", "true"]) == 0
    report = read(tmp_path / "sft.report.json")
    assert report["kept"] == 20 and report["verification"]["verified"] == 20
    assert report["unusable_rows"]["unreadable image"]["rows"] == [4]
    assert "20 of 20" in capsys.readouterr().out


def test_an_error_without_usable_rows_names_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vqa.jsonl"
    path.write_text(json.dumps({"image": "none.png", "question": "What?", "answer": "nothing"}))
    assert command([str(path), "--out", str(tmp_path / "sft.json")]) == 2
    assert "unreadable image" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ text and tools
def test_calls_that_print_and_show_two_images_are_built_and_verified(tmp_path: Path, sandbox: Sandbox) -> None:
    plan = PlanConfig(shares={"single_tool": 1.0, "error_recovery": 1.0}, text_share=0.5, pair_share=0.5, transforms=())
    out = tmp_path / "sft.json"
    report = build([table(tmp_path, 12)], out, plan=plan)
    answered = [turn for item in read(out) for turn in item["conversations"] if turn["from"] == "tool"]
    assert report["kept"] == len(read(out)) >= 6 and verified(out, sandbox).problems == {}
    assert any(turn["value"] == "<image>" and "(" in turn.get("text", "") for turn in answered)
    assert any(turn["value"] == "<image><image>" for turn in answered)
    assert any("Error" in turn.get("error", "") and not turn["value"] for turn in answered)
    items = read(out)
    items[0]["conversations"][2] |= {"text": "(1, 1)"}
    out.write_text(json.dumps(items))
    assert verified(out, sandbox).to_json()["differences"] == {"other text": 1}


def test_calls_of_a_file_are_run_again_with_their_real_results(tmp_path: Path) -> None:
    def turns(*calls: tuple[str, dict[str, Any], dict[str, Any]]) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = [{"from": "human", "value": "<image>How wide?"}]
        for name, arguments, tool in calls:
            made += [{"from": "gpt", "value": "<think>a</think>" + call_markup(name, {"image_index": 0, **arguments})}]
            made += [{"from": "tool", **tool}]
        return [*made, {"from": "gpt", "value": "<think>b</think><answer>80</answer>"}]

    width, image = {"code": "image.width"}, {"value": "<image>"}
    box = {"box": [0, 0, 20, 10], "label": "corner"}
    conversations = [
        (turns(("code_image_tool", width, {"text": "80"})), 1),
        (turns(("code_image_tool", width, {"value": "The width is 79."})), 1),
        (turns(("crop_box", box, image), ("code_image_tool", {**width, "image_index": 1}, {"text": "20"})), 2),
        (turns(("code_image_tool", {"code": "1 / 0"}, image)), 2),
        (turns(("code_image_tool", {"code": "show(image)\nresult = image.rotate(180)"}, image)), 2),
        (turns(("paint", {}, {"text": "80"})), 1),
    ]
    items = [{"conversations": turns, "images": ["a.png", "b.png"][:count]} for turns, count in conversations]
    source, out = tmp_path / "teacher.json", tmp_path / "sft.json"
    source.write_text(json.dumps(items))
    whole = Image.effect_noise((80, 60), 50).convert("RGB")
    whole.save(tmp_path / "a.png")
    whole.crop((0, 0, 20, 10)).save(tmp_path / "b.png")
    report = build([str(source)], out, tools=[CodeTool(), CropBoxTool()])
    assert {kind: entry["count"] for kind, entry in report["differing"].items()} == {
        "other text": 1,
        "other number of images": 1,
    }
    assert list(report["dropped"]) == ["call fails"] and list(report["unusable_rows"]) == ["unknown tool"]
    first, second, third, last = read(out)
    assert first["conversations"][2] == second["conversations"][2] == {"from": "tool", "value": "", "text": "80"}
    assert third["conversations"][1::2] == items[2]["conversations"][1::2]
    assert [turn.get("text") or turn["value"] for turn in third["conversations"][2::2]] == ["<image>", "20"]
    assert last["conversations"][2] == {"from": "tool", "value": "<image><image>"}
    again = build([str(out)], tmp_path / "again.json", tools=[CodeTool(), CropBoxTool()])
    assert again["kept"] == 4 and not again["differing"]
    assert [item["conversations"] for item in read(tmp_path / "again.json")] == [
        item["conversations"] for item in read(out)
    ]


# ------------------------------------------------------------------------------------------------ endpoint
def teacher_reply(prompt: list[dict[str, Any]], slip: str = "") -> str:
    """What a teacher that follows its directive says; `slip` makes its first try at each turn go wrong."""
    directive = prompt[-1]["content"][0]["text"]
    assert prompt[0]["content"].startswith("You write training conversations")
    assert any(part["type"] == "image_url" for part in prompt[1]["content"])
    if "Answer now" in directive:
        answer = directive.split("must say: ")[1].split("\n")[0]
        said = "wrong" if slip and "refused" not in directive else answer
        return f"<think>I can read it.</think>\n<answer>{said}</answer>"
    index = int(directive.split("image_index ")[1].split(",")[0])
    if "with these coordinates: " in directive:
        code = directive.split("with these coordinates: ")[1].split("\nThe call")[0]
    else:
        turns = {"270 degrees": "image.rotate(270, expand=True)", "180": "image.rotate(180)"}
        turns |= {"by 90": "image.rotate(90, expand=True)", "mirror it": "ImageOps.mirror(image)"}
        aim = directive.split("Image ")[1].split(": ", 1)[1].split(", and do")[0]
        code = "result = " + next((code for words, code in turns.items() if words in aim), "ImageOps.flip(image)")
    if "End the code with the line " in directive:
        code += "\n" + directive.split("End the code with the line ")[1].split(", so that it")[0]
    if "raises an exception" in directive:
        code = code.replace("image", "picture")
    if slip and "refused" not in directive:
        code = slip
    call = {"name": "code_image_tool", "arguments": {"code": code, "image_index": index}}
    return f"<think>I change the image.</think>\n<tool_call>\n{json.dumps(call)}\n</tool_call>"


def scripted(server: JudgeServer, slip: str = "") -> Any:
    async def answer(number: int, writer: asyncio.StreamWriter, prompt: str) -> None:
        messages: Any = server.requests[number]["messages"]
        await respond(writer, completion(teacher_reply(messages, slip)))

    return answer


def test_a_teacher_behind_an_endpoint(tmp_path: Path, sandbox: Sandbox) -> None:
    out = tmp_path / "sft.json"
    with JudgeServer() as server:
        server.misbehave = scripted(server)
        teacher = TeacherConfig(base_url=server.url, price_per_million_prompt_tokens=10.0)
        report = build([table(tmp_path, 20)], out, teacher=teacher)
    assert report["kept"] == 20, report["dropped"]
    assert verified(out, sandbox).verified == 20
    usage = report["usage"]
    turns = sum(len(item["conversations"]) // 2 for item in read(out))
    assert usage["requests"] == turns == len(server.requests)
    assert usage["prompt_tokens"] == 100 * turns and usage["cost"] == pytest.approx(100 * turns * 10 / 1e6)


def test_a_refused_turn_is_asked_for_again_with_the_reason(tmp_path: Path) -> None:
    with JudgeServer() as server:
        server.misbehave = scripted(server, slip="result = image.convert('L')")
        report = build([table(tmp_path, 5)], tmp_path / "sft.json", teacher=TeacherConfig(base_url=server.url))
        assert report["kept"] == 5, report["dropped"]
        assert report["rewritten_turns"] == len(server.requests) / 2
        told = [request["messages"][-1]["content"][0]["text"] for request in server.requests]  # type: ignore[index]
        assert any("refused: the call must" in text for text in told)
        assert any("refused: the answer 'wrong' is not right" in text for text in told)
        one = TeacherConfig(base_url=server.url, tries=1)
        with pytest.raises(DataError, match=r"no conversation was kept: .*turn refused"):
            build([table(tmp_path, 5)], tmp_path / "none.json", teacher=one)


def test_the_judge_decides_where_the_rules_refuse(tmp_path: Path, sandbox: Sandbox) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    path = tmp_path / "vqa.jsonl"
    rows = [{"image": "a.png", "question": f"What is it, {at}?", "answer": "a red door"} for at in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    no_tool = PlanConfig(shares={"no_tool": 1.0})
    with JudgeServer() as server, JudgeServer() as judge:

        async def paraphrase(number: int, writer: asyncio.StreamWriter, prompt: str) -> None:
            said = "a red door indeed" if number % 2 else "no door at all"
            await respond(writer, completion(f"<think>I see it.</think>\n<answer>{said}</answer>"))

        server.misbehave = paraphrase
        options: dict[str, Any] = {"teacher": TeacherConfig(base_url=server.url, tries=1), "max_parallel": 1}
        options |= {"plan": no_tool, "judge": JudgeConfig(base_url=judge.url)}
        report = build([str(path)], tmp_path / "sft.json", **options)
    assert report["kept"] == 2 and report["dropped"]["turn refused: answer"]["count"] == 2
    assert report["judge"]["verdicts"] >= 4
    assert all(item["build"]["judged"] for item in read(tmp_path / "sft.json"))
    assert verified(tmp_path / "sft.json", sandbox).verified == 2


def test_a_dead_endpoint_stops_the_build_and_loses_nothing(tmp_path: Path) -> None:
    files, out = [table(tmp_path, 20)], tmp_path / "sft.json"
    teacher = {"max_attempts": 1, "give_up_s": 5.0}
    with JudgeServer() as server:
        good = scripted(server)

        async def dies(number: int, writer: asyncio.StreamWriter, prompt: str) -> None:
            if number >= 12:
                await respond(writer, b"no", "500 Internal Server Error")
            else:
                await good(number, writer, prompt)

        server.misbehave = dies
        config = TeacherConfig(base_url=server.url, **teacher)  # type: ignore[arg-type]
        with pytest.raises(EndpointError, match="the same command resumes"):
            build(files, out, teacher=config, max_parallel=2)
        done = [json.loads(line) for line in (tmp_path / "sft.progress.jsonl").read_text().split("\n")[1:] if line]
        assert 2 <= sum(entry["problem"] is None for entry in done) < 20
        server.misbehave = good
        report = build(files, out, teacher=config, max_parallel=2)
    assert report["kept"] == report["tried"] == 20


def test_a_key_in_the_wrong_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--teacher.api_key_env is not the name"):
        TeacherConfig(api_key_env="sk-123")
