from __future__ import annotations

import pytest

from diffalign import assets
from diffalign.cli import doctor, main
from diffalign.cli.doctor import Finding, examine


def test_every_subject_is_examined():
    findings = list(examine())
    subjects = {finding.subject for finding in findings}
    assert {"python", "torch", "diffusers", "open_clip", "cpu", "precision", "disk", "hub cache"} <= subjects
    assert {"bundled", "configs", "jpeg_compressibility", "clip"} <= subjects
    smoke = next(finding for finding in findings if finding.subject == "jpeg_compressibility")
    assert (smoke.status, smoke.detail[0]) == ("ok", "-")  # minus the size of the JPEG file in kB


def test_whatever_is_not_ok_comes_with_advice():
    for finding in examine():
        assert finding.status == "ok" or finding.advice


def test_missing_assets_fail_the_command_and_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "diffalign")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "FAIL  bundled" in shown.out
    assert "missing: tiny-sd, clip" in shown.out
    assert shown.err.startswith("error: 2 checks failed: bundled, configs\n")


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(monkeypatch):
    def _disk():
        raise OSError("the disk is on fire")
        yield

    monkeypatch.setattr(doctor, "_disk", _disk)
    findings = {finding.subject: finding for finding in examine()}
    assert findings["disk"].status == "FAIL"
    assert "the disk is on fire" in findings["disk"].detail
    assert "jpeg_compressibility" in findings


@pytest.mark.parametrize(
    ("free", "status"), [(0.5e9, "FAIL"), (5e9, "warn"), (500e9, "ok")], ids=["none", "little", "plenty"]
)
def test_disk_space_is_judged(monkeypatch, free, status):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    (finding,) = doctor._disk()
    assert finding.status == status


def test_a_finding_is_a_line_and_its_advice_another():
    finding = Finding("warn", "gpu", "none", "get one")
    assert str(finding) == "warn  gpu                  none\n                           -> get one"
