// Before anything is drawn: the colours that were chosen last time ("light", "dark"), or else the system's.
try {
  const chosen = localStorage.getItem("palate:theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* storage is off: the system's colours */ }
