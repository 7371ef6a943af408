// A conversation in headless Chromium with the page that the server gives: node web_chat.mjs URL CHROMIUM [FOLDER for screenshots].
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [url, executablePath, shots] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
const context = await browser.newContext({ viewport: { width: 1100, height: 760 }, colorScheme: "light" });
const page = await context.newPage();
const problems = [];
page.on("pageerror", (error) => problems.push(String(error)));
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
page.on("request", (request) => request.url().startsWith(url) || request.url().startsWith("data:") || problems.push(`it asks ${request.url()}`));
const shoot = async (name) => shots && (await page.screenshot({ path: `${shots}/${name}.png` }));

const answers = page.locator("article.assistant");
const last = answers.last();
const isDone = async () => {
  await page.locator("#send").waitFor({ state: "visible" });
  await page.waitForFunction(() => !document.querySelector("[aria-busy]"));
};
const say = async (text) => {
  await page.getByLabel("Message", { exact: true }).fill(text);
  await page.keyboard.press("Enter");
};
const settings = async (fill) => {
  await page.getByText("Settings").click();
  await fill();
  await page.getByText("Settings").click();
};

// It loads, and knows its model.
await page.goto(url);
assert.equal(await page.getByLabel("Model").inputValue(), "bundled");
assert.ok(await page.getByLabel("Message", { exact: true }).evaluate((element) => element === document.activeElement));
await settings(async () => {
  await page.getByLabel("Most tokens").fill("40");
  await page.getByLabel("Temperature").fill("0");
});

// Send and stream.
await say("Tell me a story about a <b>cat</b>.");
await isDone();
assert.equal(await page.locator("article.user").innerText(), "You\nTell me a story about a <b>cat</b>.");
const first = await last.innerText();
assert.ok(first.length > 20, first);
assert.match(await page.locator("#status").innerText(), /bundled: \d+ tokens, [\d.]+ tokens\/s/);
await shoot("light");

// Regenerate: the most likely tokens are the same ones.
await page.getByRole("button", { name: "Regenerate" }).click();
await isDone();
assert.equal(await answers.count(), 1);
const withoutSpeed = (text) => text.replace(/\d+ tokens, .*/, "");
assert.equal(withoutSpeed(await last.innerText()), withoutSpeed(first));

// Stop: what was said stays, and the server drops the rest.
await settings(() => page.getByLabel("Most tokens").fill("100000"));
const network = await context.newCDPSession(page);
const receive = (downloadThroughput) =>
  network.send("Network.emulateNetworkConditions", { offline: false, latency: 0, downloadThroughput, uploadThroughput: -1 });
// So slowly that there is time to stop it.
await receive(1000);
await say("And then?");
await page.waitForFunction(() => document.querySelectorAll("article.assistant p").length > 1);
await page.getByRole("button", { name: "Stop" }).click();
await isDone();
await receive(-1);
assert.equal(await answers.count(), 2);
const stopped = await last.innerText();
await page.waitForTimeout(300);
assert.equal(await last.innerText(), stopped);

// A reload keeps conversations, and a new one begins beside the old.
await page.reload();
await page.getByLabel("Model").waitFor();
assert.equal(await last.innerText(), stopped);
await page.getByRole("button", { name: "New conversation" }).first().click();
assert.equal(await answers.count(), 0);
await settings(() => page.getByLabel("Most tokens").fill("5"));
await say("Hello");
await isDone();
assert.equal(await page.locator("nav li").count(), 2);
await page.getByRole("button", { name: "Tell me a story", exact: false }).first().click();
assert.equal(await answers.count(), 2);
await page.getByRole("button", { name: "Delete Hello" }).click();
assert.equal(await page.locator("nav li").count(), 1);

// What the server refuses is said.
await settings(() => page.getByLabel("Temperature").fill("-1"));
await say("Hm?");
await isDone();
assert.match(await last.innerText(), /No answer: .*temperature/);
assert.ok(problems.splice(0).every((problem) => problem.includes("400")));
await settings(() => page.getByLabel("Temperature").fill("0"));

// Markdown and code, and nothing of it as HTML.
const text = [
  "# Title", "Some **bold**, *soft*, `code` and [a link](https://example.org).", "", "- one", "- two", "  1. deeper", "", "| a | b |", "| --- | --- |",
  "| 1 | <img src=x onerror=alert(1)> |", "", "```python", "print('<script>')", "```", "", "> quoted",
].join("\n");
await page.evaluate((content) => {
  const kept = JSON.parse(localStorage.getItem("metal-marlin"));
  kept.conversations[0].messages.push({ role: "user", content: "Show me." }, { role: "assistant", content, reasoning: "First I think." });
  localStorage.setItem("metal-marlin", JSON.stringify(kept));
}, text);
await page.reload();
for (const [selector, count] of Object.entries({ h3: 1, strong: 1, em: 1, "ul > li": 2, "ol > li": 1, td: 2, pre: 1, blockquote: 1, "a[href='https://example.org']": 1, img: 0, "details:not([open])": 1 })) {
  assert.equal(await last.locator(selector).count(), count, selector);
}
assert.equal(await last.locator("pre").innerText(), "print('<script>')");

// Dark, by the system and by choice.
const back = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
const light = await back();
await page.emulateMedia({ colorScheme: "dark" });
const dark = await back();
assert.notEqual(light, dark);
await shoot("dark");
await page.getByRole("button", { name: "Theme: system" }).click();
assert.equal(await back(), light);
await page.getByRole("button", { name: "Theme: light" }).click();
assert.equal(await back(), dark);

// A narrow screen: nothing is cut off, and the conversations are behind a button.
await page.setViewportSize({ width: 360, height: 640 });
assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
assert.ok(await page.locator("nav").isHidden());
await page.getByRole("button", { name: "Conversations" }).click();
assert.ok(await page.locator("nav").isVisible());
await shoot("narrow");
await page.keyboard.press("Escape");
assert.ok(await page.locator("nav").isHidden());

assert.deepEqual(problems, []);
await browser.close();
console.log("web chat: ok");
