import subprocess

from conftest import CONFIGS

from dynprune_jax import provenance
from dynprune_jax.main import MODES, main
from dynprune_jax.provenance import checkout


def test_the_commit_of_a_checkout_is_told_and_whether_files_differ(tmp_path):
    def git(*arguments):
        who = ("-c", "user.name=n", "-c", "user.email=n@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    inside = tmp_path / "installed"
    inside.mkdir()
    (inside / "code.py").write_text("1\n", encoding="utf-8")
    assert checkout(tmp_path) is None
    git("init", "--quiet")
    assert checkout(tmp_path) is None  # nothing is committed yet
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    commit = git("rev-parse", "HEAD")
    told = checkout(tmp_path)
    assert told
    assert len(told) >= 7
    assert commit.startswith(told)
    assert checkout(inside) is None  # installed somewhere in another project
    (inside / "code.py").write_text("2\n", encoding="utf-8")
    assert checkout(tmp_path) == f"{told}+"


def test_a_report_tells_the_commit_that_its_program_began_with(monkeypatch):
    def commit_and_see(*_):
        monkeypatch.setattr(provenance, "checkout", lambda _: "later")
        told.append(provenance.versions()["commit"])

    told = []
    monkeypatch.setitem(MODES, "train", commit_and_see)
    monkeypatch.setattr(provenance, "checkout", lambda _: "at first")
    provenance.commit.cache_clear()
    try:
        assert main(["main", f"--config={CONFIGS / 'digits_vgg.py'}", "--workdir=none"]) == 0
    finally:
        provenance.commit.cache_clear()
    assert told == ["at first"]
