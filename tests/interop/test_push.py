"""What goes to the hub, up to the upload, which a local server answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tsae.checkpoint import RunFolder, load_dictionary
from tsae.cli import main
from tsae.interop import sae_lens
from tsae.runtime.files import write_json


def test_a_dry_run_shows_a_folder_that_loads(make_run, tmp_path: Path, activations, capsys, monkeypatch) -> None:
    run, dictionary = make_run()
    (run / "trainer_0/explanations.json").write_text('{"4": "rivers"}')
    out = tmp_path / "out"
    options = ["--dry-run", "--licence", "apache-2.0", "--with", "sae_lens", "--out", str(out)]
    monkeypatch.setenv("TSAE_HOME", str(tmp_path / "home"))
    (tmp_path / "home/checkpoints").mkdir(parents=True)
    run = run.rename(tmp_path / "home/checkpoints/mine")
    assert main(["push", "mine", "someone/tsae", *options]) == 0
    shown = capsys.readouterr().out
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    expected = {"README.md", "config.json", "ae.pt", "eval_results.json", "explanations.json", "resolved.yaml"}
    assert names == expected | {"sae_lens/cfg.json", "sae_lens/sae_weights.safetensors"}
    assert all(name in shown for name in names)
    assert "nothing was uploaded" in shown
    for loaded in (load_dictionary(out)[0], sae_lens.load(out / "sae_lens")[0]):
        assert torch.equal(loaded.encode(activations), dictionary.encode(activations))


def test_the_card_states_rule_threshold_measures_data_licence_and_how_to_load(make_run, tmp_path: Path) -> None:
    run, dictionary = make_run()
    main(["push", str(run), "someone/tsae", "--dry-run", "--licence", "mit", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("mit", "google/gemma-2-2b")
    assert data.datasets == ["monology/pile-uncopyrighted"]
    assert "temporal-sae" in data.tags
    assert f"**{float(dictionary.threshold)}**" in text
    assert "5.25 latents are active per token on held-out text" in text
    assert "| Fraction of variance explained | 0.75 |" in text
    assert "± 0.5 |" in text
    assert "contexts of 256 tokens" in text
    assert 'load_dictionary("someone/tsae")' in text
    assert "| k | `5` |" in text


def test_nothing_uploaded_names_a_place_on_this_machine(make_run, tmp_path: Path) -> None:
    text = tmp_path / "private/corpus.jsonl"
    text.parent.mkdir()
    text.write_text("{}")
    run, _ = make_run(data={"source": str(text)}, model={"name": str(tmp_path / "private/my-model")})
    main(["push", str(run), "someone/tsae", "--dry-run", "--with", "sae_lens", "--out", str(tmp_path / "out")])
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"private" not in content, path
            assert b"secret-host" not in content, path
    assert "corpus.jsonl" in (tmp_path / "out/README.md").read_text()


def test_measures_of_another_threshold_are_left_out_and_the_calibration_told(make_run, tmp_path: Path) -> None:
    run, dictionary = make_run()
    folder = RunFolder(run / "trainer_0")
    write_json(folder.eval_results, {"l0": 99.0, "threshold": float(dictionary.threshold) + 1})
    before, after = {"l0": 7.5, "fve": 0.5}, {"l0": 5.0, "fve": 0.4375}
    record = {"encode_rule": "threshold", "threshold": float(dictionary.threshold), "target_l0": 5.0, "tokens": 1234}
    config = json.loads(folder.config_json.read_text())
    write_json(folder.config_json, config | {"calibration": record | {"before": before, "after": after}})
    main(["push", str(run), "someone/tsae", "--dry-run", "--with", "sae_lens", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    assert "99 latents" not in text
    assert "Not evaluated" in text
    assert (
        "set for 5 active latents per token, on 1,234 held-out tokens: L0 5, fraction of variance explained 0.4375"
        in text
    )
    assert "(before: L0 7.5, 0.5000)" in text
    metadata = json.loads((tmp_path / "out/sae_lens/cfg.json").read_text())["metadata"]
    assert metadata["tsae_threshold_l0"] == 5.0


def test_without_a_licence_the_card_says_so(make_run, tmp_path: Path) -> None:
    run, _ = make_run()
    main(["push", str(run), "someone/tsae", "--dry-run", "--out", str(tmp_path / "out")])
    text = (tmp_path / "out/README.md").read_text()
    assert "The uploader stated none" in text
    assert ModelCard(text).data.license is None


@pytest.mark.parametrize("repo_id", ["tsae", "a/b/c", "some one/x", "someone/--"])
def test_an_impossible_repository_id_is_refused(make_run, capsys, repo_id: str) -> None:
    run, _ = make_run()
    assert main(["push", str(run), repo_id, "--dry-run"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class Hub(BaseHTTPRequestHandler):
    """Takes notes of requests and refuses to make a repository."""

    requests: list[tuple[str, dict]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, json.loads(body)))
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[tuple[str, dict]]]]:
    requests: list[tuple[str, dict]] = []
    server = HTTPServer(("127.0.0.1", 0), type("Recorder", (Hub,), {"requests": requests}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


def push(run: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tsae.cli", "push", str(run), "someone/tsae", "--private"]
    environment = {**os.environ, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_upload_asks_the_hub_for_a_private_repository_and_reports_its_refusal(make_run, hub) -> None:
    run, _ = make_run()
    address, requests = hub
    ran = push(run, HF_ENDPOINT=address)
    assert ran.returncode == 2
    assert ran.stderr.startswith("tsae: someone/tsae: the hub refused the upload")
    assert ran.stderr.count("\n") == 1
    path, body = requests[0]
    assert path == "/api/repos/create"
    assert body["name"] == "tsae"
    assert body["organization"] == "someone"
    assert body.get("private") is True or body.get("visibility") == "private"


def test_offline_mode_is_one_line(make_run) -> None:
    run, _ = make_run()
    ran = push(run, HF_HUB_OFFLINE="1")
    assert ran.returncode == 2
    assert ran.stderr == "tsae: someone/tsae: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it\n"
