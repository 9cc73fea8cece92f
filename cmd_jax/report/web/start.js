showOverview();
showCurves();
showBrowser();
showMap();
showConfusion();
showParts();
document.documentElement.dataset.ready = 'true';
