"""The page at `/`: how its files are served, and what it does in a real browser."""

import re
import shutil

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from serve.web_page import FOLDER, PAGE
from tests.endpoint import HeldSteps, complete, endpoint, expected, save_model, text_of

pytestmark = pytest.mark.cluster
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here; `apt-get install chromium` brings it")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """(base URL, service) of an endpoint that needs the key `secret`."""
    with endpoint(save_model(tmp_path_factory.mktemp("guarded") / "m"), api_key="secret", max_model_len=40) as served:
        yield served


@pytest.fixture(scope="module")
def browser(served, guarded):
    """Starts after the endpoints, because they cannot start in the thread of its event loop."""
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # root has no sandbox


@pytest.fixture
def opened(browser):
    """Opens a URL in a new page. The page must report no error, and must ask no other server."""
    context = browser.new_context()
    page, errors, hosts = context.new_page(), [], set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(httpx.URL(request.url).netloc.decode()))

    def open_page(url):
        page.goto(url)
        return page

    yield open_page
    refused = "the server responded with a status of 40"  # browsers themselves report each refusal
    assert [error for error in errors if refused not in error] == []
    assert len(hosts) == 1
    context.close()


def settings(page, **values):
    for label, value in values.items():
        field = page.get_by_label(label.replace("_", " "))
        field.select_option(value) if label == "Acceptance" else field.fill(str(value))


def steps(page, place):
    return page.locator(f"{place} .step").all_inner_texts()


def blocks(text):
    return [text[i : i + 4] for i in range(0, len(text), 4)]


def figure(page, place, name):
    return page.locator(f"{place} [data-figure={name}]").inner_text()


def test_files_of_the_page_need_no_key_and_name_no_other_server(guarded):
    url, _ = guarded
    for path, (name, media_type) in PAGE.items():
        answer, head = httpx.get(url + path), httpx.head(url + path)
        assert (answer.status_code, head.status_code, head.content) == (200, 200, b""), path
        assert answer.text == (FOLDER / name).read_text()
        assert answer.headers["content-type"].split(";")[0] == media_type
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert set(re.findall(r"https?://[^\"' )]+", answer.text)) <= {"http://www.w3.org/2000/svg"}
    assert httpx.get(f"{url}/page/other.js").status_code == 401
    assert {file.name for file in FOLDER.iterdir()} == {name for name, _ in PAGE.values()}


def test_a_models_card_says_whether_it_chats_and_how_it_accepts(http):
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert [(card["chat_template"], card["acceptance"]) for card in cards.values()] == [(True, "fixed")] * 2


@needs_browser
def test_each_box_of_a_chats_answer_is_one_step(served, student, opened):
    page = opened(served[0])
    settings(page, Seed=3, Tokens_of_the_answer_at_most=12)
    page.get_by_label("Your message").fill("abc")
    page.keyboard.press("Enter")
    expect(page.locator("#chat-status")).to_have_text(re.compile(r"complete: \d+ tokens"))
    whole = text_of(expected(student, "u abc ", seed=3))
    assert "".join(steps(page, "#messages")) == whole
    assert steps(page, "#messages") == blocks(whole)
    assert figure(page, "#messages", "tokens") == str(len(whole))


@needs_browser
def test_a_race_in_exact_mode_ends_with_equal_texts(served, http, opened):
    page = opened(f"{served[0]}/#race")
    answers = ((seed, complete(http, prompt="u abc ", model="teacher", seed=seed)) for seed in range(100))
    seed, whole = next((seed, a["choices"][0]["text"]) for seed, a in answers if a["usage"]["completion_tokens"] == 12)
    settings(page, Acceptance="exact", Seed=seed, Tokens_of_the_answer_at_most=12)
    page.get_by_label("Prompt").fill("abc")
    for order in ("one after the other", "at once"):
        page.get_by_label(order).check()
        page.get_by_role("button", name="Start the race").click()
        expect(page.get_by_role("status")).to_contain_text("Both texts are equal.")
        assert steps(page, "#ar") == list(whole)
        assert "".join(steps(page, "#student")) == whole
        made = len(steps(page, "#student"))
        assert (figure(page, "#ar", "steps"), figure(page, "#student", "steps")) == ("12", str(made))
        assert figure(page, "#student", "perStep") == f"{12 / made:.2f}"
        assert re.fullmatch(r"\d+ ms", figure(page, "#student", "first"))
        assert float(figure(page, "#student", "speed")) > 0
    settings(page, Acceptance="fixed")
    page.get_by_role("button", name="Start the race").click()
    expect(page.get_by_role("status")).to_contain_text("The texts differ after")
    fixed = complete(http, prompt="u abc ", seed=seed)["choices"][0]["text"]
    assert steps(page, "#student") == blocks(fixed)


@needs_browser
def test_the_page_asks_for_the_key_and_keeps_it_in_memory_alone(guarded, opened):
    page = opened(guarded[0])
    key, refused = page.get_by_label("API key", exact=True), page.get_by_role("dialog").get_by_role("alert")
    expect(key).to_be_focused()
    for typed in ("wrong", "secret"):
        key.fill(typed)
        page.keyboard.press("Enter")
        if typed == "wrong":
            expect(refused).to_have_text("The endpoint refused this key.")
    expect(page.locator("#served")).to_have_text("serves tiny (k = 4) and teacher (AR)")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    expect(page.locator("#key")).to_have_value("")
    page.reload()
    expect(key).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("This endpoint needs an API key.")
    page.get_by_label("Your message").fill("abc")
    page.get_by_role("button", name="Send").click()
    expect(key).to_be_focused()


@needs_browser
def test_a_long_chat_keeps_its_end_in_view_until_the_reader_scrolls_up(served, opened):
    page = opened(served[0])
    page.set_viewport_size({"width": 400, "height": 500})
    settings(page, Tokens_of_the_answer_at_most=4)
    top, send = page.get_by_role("heading", name="kforcing"), page.get_by_role("button", name="Send")
    for count, in_view in ((1, send), (2, send), (3, top)):
        if in_view is top:
            page.mouse.wheel(0, -10_000)
            expect(top).to_be_in_viewport()
        page.get_by_label("Your message").evaluate("field => { field.value = 'abc'; field.form.requestSubmit() }")
        expect(page.locator("#messages .model")).to_have_count(count)
        expect(page.locator("#chat-status")).to_contain_text("complete")
        expect(in_view).to_be_in_viewport()


@needs_browser
def test_an_answer_can_be_stopped_and_a_refusal_is_shown(guarded, opened):
    url, service = guarded
    page = opened(url)
    page.get_by_label("API key", exact=True).fill("secret")
    page.keyboard.press("Enter")
    held = HeldSteps(service.models["tiny"].engine)
    held.release(1)
    page.get_by_label("Your text").fill("abc")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#messages .step")).to_have_count(1)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#chat-status")).to_have_text("The answer is not complete.")
    held.release(100)
    settings(page, Tokens_of_the_answer_at_most=39)
    page.get_by_label("Your text").fill("abc")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#messages").get_by_role("alert").last).to_contain_text("maximum context length is 40 tokens")
