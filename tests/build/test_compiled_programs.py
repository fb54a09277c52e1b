"""The cache of compiled programs: what it holds is used again, what is not whole is thrown away, and it can be off."""

import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.build import compiled_programs
from llmjax.build.compiled_programs import reuse_programs, without_cache

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture(autouse=True)
def keep_all(monkeypatch):
    monkeypatch.setattr(compiled_programs, "_MIN_SECONDS", 0.0)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def run(cache, n=3, megabytes=1):
    """Compiles and runs a function of its own; (its value, how often the cache had a program, how often not)."""
    events = []
    listen = lambda event, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    try:
        with reuse_programs(cache, megabytes), warnings.catch_warnings():
            warnings.simplefilter("error")
            value = jax.jit(lambda x: jnp.sin(x) * n)(np.arange(7.0, dtype=np.float32))
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return np.asarray(value), events.count(HIT), events.count(MISS)


def entries(cache):
    return sorted(cache.rglob("*-cache"))


def test_a_program_is_compiled_once_and_gives_the_same_bits(tmp_path):
    first, hits, misses = run(tmp_path)
    assert hits == 0 and misses >= 1 and len(entries(tmp_path)) == misses
    again, hits, more = run(tmp_path)
    assert hits == misses and more == 0
    np.testing.assert_array_equal(first, again)
    assert jax.config.jax_compilation_cache_dir is None


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def never_finished(path):
    path.with_name(path.name + ".digest").unlink()


def emptied(path):
    path.write_bytes(b"")


def with_a_digest_that_is_no_text(path):
    path.with_name(path.name + ".digest").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("harm", [half, flipped, never_finished, emptied, with_a_digest_that_is_no_text])
def test_an_entry_that_is_not_whole_is_compiled_again(harm, tmp_path):
    first, _, misses = run(tmp_path)
    for path in entries(tmp_path):
        harm(path)
    again, hits, more = run(tmp_path)
    assert (hits, more) == (0, misses)
    np.testing.assert_array_equal(first, again)
    assert run(tmp_path)[1:] == (misses, 0)


def test_the_oldest_entries_go_when_there_is_no_more_room(tmp_path):
    run(tmp_path)
    sizes = {}
    for age, path in enumerate(entries(tmp_path)):
        os.utime(path, (1_000_000 + age,) * 2)
    filler = entries(tmp_path)[0].with_name("filler-cache")
    filler.write_bytes(bytes(1_048_576 - 10))
    compiled_programs._seal(filler.parent, set(sizes), 0.0)
    assert run(tmp_path, n=4)[1] == 0
    assert filler in entries(tmp_path)
    assert sum(path.stat().st_size for path in entries(tmp_path)) > 1_048_576 - 10
    os.utime(filler, (1, 1))
    run(tmp_path, n=4)
    assert filler not in entries(tmp_path) and not list(tmp_path.rglob("filler*"))


@pytest.mark.parametrize("megabytes", [0, 1])
def test_it_can_be_off_and_leaves_a_cache_of_the_user_alone(megabytes, tmp_path):
    if megabytes:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    run(tmp_path / "cache", megabytes=megabytes)
    assert not (tmp_path / "cache").exists()


def test_without_a_place_to_write_there_is_a_sentence_and_no_cache(tmp_path, capsys):
    (tmp_path / "compiled").write_text("a file in its place")
    value, hits, _ = run(tmp_path)
    assert hits == 0 and value[0] == 0
    assert "compiled programs were not kept" in capsys.readouterr().err


@pytest.mark.parametrize("fails", ["write", "read"])
def test_what_jax_warns_of_for_each_program_is_one_sentence(fails, tmp_path, capsys, monkeypatch):
    def compile_both():
        jax.clear_caches()
        for n in (3, 4):
            jax.jit(lambda x: jnp.sin(x) * n)(np.arange(7.0, dtype=np.float32))  # noqa: B023

    others = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_: others.append(str(message)))
        with reuse_programs(tmp_path, 1):
            compile_both()
            for path in entries(tmp_path):
                path.unlink()
                if fails == "read":
                    path.mkdir()
            if fails == "write":
                shutil.rmtree(tmp_path)
            compile_both()
            warnings.warn("another warning", stacklevel=1)
    err = capsys.readouterr().err
    what = {"write": "not kept, as files cannot be written", "read": "not used, as files cannot be read"}[
        fails
    ]
    assert err.count(what) == 1 and err.count("compilation_cache_mb=0") == len(err.splitlines())
    assert others == ["another warning"]


def test_where_a_program_must_be_compiled_no_cache_is_asked(tmp_path):
    run(tmp_path)
    with without_cache():
        assert run(tmp_path)[1:] == (0, 0)
    assert run(tmp_path)[1] > 0
