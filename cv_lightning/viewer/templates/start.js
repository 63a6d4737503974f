// Start every part of the page.
startIntervals();
startCurves();
startCompared();
startExamples();
startGallery();
startLive();
