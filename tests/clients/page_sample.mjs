// node page_sample.mjs RUNNERS CHROMIUM NODE_MODULES FOLDER PICTURE.png ASK.json
// Fills in the form of a folder's samples/index.html as a person would; prints what the page says.
import { pathToFileURL } from "node:url";
import { basename, join } from "node:path";

const [runners, chromium, modules, folder, picture, ask] = process.argv.slice(2);
const { serve, visit } = await import(pathToFileURL(join(runners, "chromium.mjs")));
const name = basename(folder);
const server = await serve({ folders: { [name]: folder, node_modules: modules } });
const { device } = JSON.parse(ask);
const form = `(async () => {
  const asked = ${ask};
  const at = (id) => document.getElementById(id);
  const later = () => new Promise((done) => setTimeout(done, 50));
  while (at("go")?.disabled !== false && !at("state")?.classList.contains("wrong")) await later();
  for (const [id, value] of Object.entries(asked)) at(id).value = value;
  at("go").click();
  do await later(); while (at("go").disabled);
  const options = (id) => [...at(id).options].map((each) => each.value);
  return JSON.stringify({
    ids: at("said").dataset.ids ?? null, said: at("said").textContent, state: at("state").textContent,
    wrong: at("state").classList.contains("wrong"), what: at("what").textContent,
    precisions: options("precision"), devices: options("device"),
  });
})()`;
console.log(await visit(chromium, device, `${server.origin}/${name}/samples/index.html`, form, picture));
server.close();
process.exit(0);
