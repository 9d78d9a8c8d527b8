// Light or dark: the system's choice, until the button is pressed.

const KEY = "bridges-theme";

/** @param {HTMLButtonElement} button */
export function mountTheme(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = remembered();
  const dark = () => (chosen ? chosen === "dark" : system.matches);
  function show() {
    if (chosen) document.documentElement.dataset.theme = chosen;
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Light colours" : "Dark colours");
  }
  button.addEventListener("click", () => {
    chosen = dark() ? "light" : "dark";
    remember(chosen);
    show();
  });
  system.addEventListener("change", show);
  show();
}

// Files opened from disk may have no storage; the choice then lasts as long as the page.
function remembered() {
  try {
    const value = localStorage.getItem(KEY);
    return value === "dark" || value === "light" ? value : "";
  } catch {
    return "";
  }
}

/** @param {string} value */
function remember(value) {
  try {
    localStorage.setItem(KEY, value);
  } catch {
    return;
  }
}
