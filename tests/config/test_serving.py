"""Options of the server."""

from pathlib import Path

import pytest

from handspun.config.serving import KEY_VARIABLE, ServeOptions, is_loopback, served_models
from handspun.errors import ConfigError


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)


def test_serve_options_report_all_wrong_values_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeOptions(port=70_000, max_rows=0, max_body_mb=-1, send_seconds=0, max_rosw=3)  # type: ignore[call-arg]
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "there is no option max_rosw. Did you mean max_rows?",
        "--port is 70000",
        "--max-rows is 0",
        "--max-body-mb is -1",
        "--send-seconds is 0",
    ]


def test_serve_options_report_all_wrong_texts_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeOptions(
            model=("tuned=",), host=" ", allowed_host=("a.example:80",), allowed_origin=("https://a.example/",)
        )
    assert len(caught.value.problems) == 5  # an empty host is no loopback address either
    assert "expected a host name without a port, such as chat.example" in str(caught.value)
    assert "expected an origin, such as https://chat.example" in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "server.example"])
def test_serve_options_need_a_key_for_other_machines(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"there is no API key\. Write one into a file"):
        ServeOptions(host=host)
    assert ServeOptions(host=host, without_key=True).host == host
    assert ServeOptions(host=host, api_key_file="keys.txt").host == host
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert ServeOptions(host=host).host == host


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("LOCALHOST", True),
     ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False)],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("output", {"output": "output"}),
        ("./output/checkpoint-best/", {"output/checkpoint-best": "./output/checkpoint-best/"}),
        ("Qwen/Qwen2.5-0.5B", {"Qwen/Qwen2.5-0.5B": "Qwen/Qwen2.5-0.5B"}),
        ("/home/someone/models/tuned", {"tuned": "/home/someone/models/tuned"}),
        ("../tuned", {"tuned": "../tuned"}),
        ("~/tuned", {"tuned": "~/tuned"}),
        ("gpt-4o=output", {"gpt-4o": "output"}),
        ("base=/models/a=b", {"base": "/models/a=b"}),
    ],
)
def test_served_models_names(typed: str, expected: dict[str, str]) -> None:
    assert served_models((typed,)) == expected


def test_served_models_takes_a_path_with_an_equals_sign_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3").mkdir()
    assert served_models(("lr=3",)) == {"lr=3": "lr=3"}


def test_served_models_refuses_a_name_twice() -> None:
    with pytest.raises(ConfigError, match="there are two models named tuned"):
        served_models(("/a/tuned", "/b/tuned"))
