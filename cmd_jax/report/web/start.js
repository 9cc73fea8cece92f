showOverview();
showCurves();
showBrowser();
showMap();
showConfusion();
showParts();
showCurated();
document.documentElement.dataset.ready = 'true';
